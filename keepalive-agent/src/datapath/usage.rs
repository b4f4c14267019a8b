//! Usage: how full the maps are in which a set looks things up.

use std::os::fd::AsFd as _;

use aya::maps::{MapInfo, MapType};

use super::{Error, Evidence, syscalls};

/// A map of the set, and how full it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub map: String,
    /// Elements in it.
    pub entries: u64,
    /// Elements that it has room for.
    pub capacity: u32,
}

impl Evidence {
    /// Of the hash maps and tries of the program that was put in force. The kernel
    /// keeps no count, so the keys are gone through: some 100 ns for each.
    ///
    /// # Errors
    ///
    /// When the program is gone, or the process may not open maps by their ids
    /// (CAP_SYS_ADMIN).
    pub fn usage(&self) -> Result<Vec<Usage>, Error> {
        const READING: &str = "looking at the maps of the program";
        let program = syscalls::program_by_id(self.program).map_err(Error::call(READING))?;
        let program = syscalls::program_info(&program).map_err(Error::call(READING))?;
        let mut usages = Vec::new();
        for id in program.maps {
            let info = MapInfo::from_id(id).map_err(Error::map(READING))?;
            let is_sparse = matches!(
                info.map_type(),
                Ok(MapType::Hash | MapType::PerCpuHash | MapType::LpmTrie)
            );
            let (true, Some(name)) = (is_sparse, info.name_as_str()) else {
                continue;
            };
            let map = info.fd().map_err(Error::map(READING))?;
            let entries = syscalls::count_keys(map.as_fd(), info.key_size(), info.max_entries());
            usages.push(Usage {
                map: name.to_owned(),
                entries: entries.map_err(Error::call(READING))?,
                capacity: info.max_entries(),
            });
        }
        usages.sort_by(|one, other| one.map.cmp(&other.map));
        Ok(usages)
    }
}
