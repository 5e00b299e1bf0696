//! What the tests of the whole share: the reader of golden cases.

pub mod golden;
