//! Pool: numbers for records, the same number for the same content.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    sync::Arc,
};

use anyhow::{Result, bail};

/// Records of one kind and their numbers.
#[derive(Debug)]
pub(super) struct Pool<T> {
    /// What they are called when there are too many.
    what: &'static str,
    by_content: HashMap<Arc<T>, u32>,
    by_number: BTreeMap<u32, Arc<T>>,
    /// Numbers that were used before, all below `next`.
    free: BTreeSet<u32>,
    next: u32,
    end: u32,
}

impl<T: Eq + Hash> Pool<T> {
    /// With numbers from `first` to below `end`.
    pub(super) fn new(what: &'static str, first: u32, end: u32) -> Self {
        Self {
            what,
            by_content: HashMap::new(),
            by_number: BTreeMap::new(),
            free: BTreeSet::new(),
            next: first,
            end,
        }
    }

    /// The number of a record, and whether it is a new one.
    ///
    /// # Errors
    ///
    /// When all numbers are taken.
    pub(super) fn place(&mut self, content: T) -> Result<(u32, Option<Arc<T>>)> {
        if let Some(number) = self.by_content.get(&content) {
            return Ok((*number, None));
        }
        let number = match self.free.pop_first() {
            Some(number) => number,
            None if self.next < self.end => {
                self.next += 1;
                self.next - 1
            }
            None => bail!(
                "more {} than there was room for when the agent started: start it again",
                self.what
            ),
        };
        let content = Arc::new(content);
        self.by_content.insert(content.clone(), number);
        self.by_number.insert(number, content.clone());
        Ok((number, Some(content)))
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.by_number.get(&number).map(Arc::as_ref)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.by_number
            .iter()
            .map(|(number, content)| (*number, content.as_ref()))
    }

    /// Keeps these numbers only; the other records are handed over.
    pub(super) fn retain(&mut self, kept: &BTreeSet<u32>) -> Vec<(u32, Arc<T>)> {
        let freed: Vec<_> = self
            .by_number
            .extract_if(.., |number, _| !kept.contains(number))
            .collect();
        for (number, content) in &freed {
            self.by_content.remove(content);
            self.free.insert(*number);
        }
        freed
    }
}
