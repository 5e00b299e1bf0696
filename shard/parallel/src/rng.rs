//! torch random numbers (being written).
