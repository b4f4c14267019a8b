//! Pool: numbers for records, the same number for the same content.

use std::{collections::HashMap, hash::Hash, sync::Arc};

/// Records of one kind and their numbers.
///
/// A number is never used twice in the life of a pool: what the kernel has under
/// a number stays what it was, whatever became of later changes, unless it is
/// [replaced](Pool::replace).
#[derive(Debug)]
pub(super) struct Pool<T> {
    first: u32,
    by_content: HashMap<Arc<T>, u32>,
    by_number: Vec<Arc<T>>,
}

impl<T: Eq + Hash> Pool<T> {
    /// With numbers from `first` on.
    pub(super) fn new(first: u32) -> Self {
        Self {
            first,
            by_content: HashMap::new(),
            by_number: Vec::new(),
        }
    }

    /// The number of a record; a new one where it is not known yet.
    pub(super) fn number_of(&mut self, content: T) -> u32 {
        if let Some(number) = self.by_content.get(&content) {
            return *number;
        }
        let number = self.end();
        let content = Arc::new(content);
        self.by_content.insert(content.clone(), number);
        self.by_number.push(content);
        number
    }

    /// Has a number stand for another record than it did.
    pub(super) fn replace(&mut self, number: u32, content: T) {
        let Some(index) = number.checked_sub(self.first) else {
            return;
        };
        let Some(place) = self.by_number.get_mut(index as usize) else {
            return;
        };
        let content = Arc::new(content);
        let replaced = std::mem::replace(place, content.clone());
        if self.by_content.get(&replaced) == Some(&number) {
            self.by_content.remove(&replaced);
        }
        self.by_content.insert(content, number);
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        let index = number.checked_sub(self.first)?;
        self.by_number.get(index as usize).map(Arc::as_ref)
    }

    /// The number that the next new record gets.
    pub(super) fn end(&self) -> u32 {
        // Records are counted against limits far below this before they are written.
        self.first
            .saturating_add(u32::try_from(self.by_number.len()).unwrap_or(u32::MAX))
    }

    /// The records from a number on.
    pub(super) fn from(&self, number: u32) -> impl Iterator<Item = (u32, &T)> {
        let skipped = number.saturating_sub(self.first);
        (self.first..)
            .zip(&self.by_number)
            .skip(skipped as usize)
            .map(|(number, content)| (number, content.as_ref()))
    }

    /// Gives up the records from a number on: the same content gets another number
    /// from now on, since the kernel may have a part of it under this one.
    pub(super) fn abandon(&mut self, since: u32) {
        let kept = since.saturating_sub(self.first) as usize;
        for content in self.by_number.iter().skip(kept) {
            self.by_content.remove(content);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_replaced_is_known_no_more() {
        let mut pool = Pool::new(5);
        let numbers = ["a", "b"].map(|content| pool.number_of(content));
        assert_eq!(numbers, [5, 6]);
        pool.replace(5, "c");
        assert_eq!(
            (pool.get(5), pool.get(6), pool.end()),
            (Some(&"c"), Some(&"b"), 7)
        );
        assert_eq!(pool.number_of("c"), 5);
        assert_eq!(pool.number_of("a"), 7);
        // Two numbers of the same content: each stays what it is.
        pool.replace(6, "c");
        pool.replace(6, "d");
        assert_eq!((pool.get(5), pool.get(6)), (Some(&"c"), Some(&"d")));
        assert_eq!(pool.number_of("d"), 6);
        // None of its own.
        pool.replace(4, "x");
        pool.replace(99, "x");
        assert_eq!(pool.from(0).count(), 3);
    }
}
