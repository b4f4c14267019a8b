use std::time::SystemTime;

/// Numbers that look random; the seed is printed, so that a failure can be had
/// again as nearly as time allows.
#[derive(Debug)]
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}

impl Random {
    /// Begins with the time of day.
    #[must_use]
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seed = now.map_or(1, |now| now.subsec_nanos().into()) | 1;
        eprintln!("seed {seed}");
        Self(seed)
    }

    /// The next number, from 0 up to and without `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// One of these.
    ///
    /// # Panics
    ///
    /// When there are none.
    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = usize::try_from(self.below(of.len() as u64));
        &of[index.unwrap_or_default()]
    }
}
