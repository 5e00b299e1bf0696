//! What a layout comes to: lanes, ranks, and how it is written.

use std::fmt;

use crate::v1::Layout;

impl Layout {
    /// How many times a group holds the component whole. An older coordinator or worker does not say: once.
    pub fn lanes(&self) -> u32 {
        self.cfg_parallel.max(1)
    }

    /// Ranks in a group.
    pub fn ranks(&self) -> u64 {
        u64::from(self.tp).saturating_mul(self.block_ranges.into()).saturating_mul(self.lanes().into())
    }

    /// Cuts as the other does, however the number of lanes was left out.
    pub fn is_same(&self, other: &Layout) -> bool {
        (self.tp, self.block_ranges, self.lanes()) == (other.tp, other.block_ranges, other.lanes())
    }

    /// For people: "tp=2 block_ranges=2", with lanes "tp=2 block_ranges=2 cfg_parallel=2".
    pub fn in_words(&self) -> String {
        let cfg_parallel = if self.lanes() == 1 { String::new() } else { format!(" cfg_parallel={}", self.lanes()) };
        format!("tp={} block_ranges={}{cfg_parallel}", self.tp, self.block_ranges)
    }
}

/// As in a picture's provenance: "tp2x2", with lanes "tp2x2xcfg2".
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tp{}x{}", self.tp, self.block_ranges)?;
        if self.lanes() == 1 { Ok(()) } else { write!(f, "xcfg{}", self.lanes()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_lanes_that_is_left_out_is_one() {
        let layout = |cfg_parallel| Layout { tp: 2, block_ranges: 3, cfg_parallel };
        assert!(layout(0).is_same(&layout(1)) && !layout(1).is_same(&layout(2)));
        assert_eq!([0, 1, 2].map(|n| layout(n).ranks()), [6, 6, 12]);
        assert_eq!([0, 1, 2].map(|n| layout(n).to_string()), ["tp2x3", "tp2x3", "tp2x3xcfg2"]);
        assert_eq!(layout(2).in_words(), "tp=2 block_ranges=3 cfg_parallel=2");
    }
}
