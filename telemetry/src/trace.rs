//! Which trace something belongs to: the W3C's `traceparent`, as it travels and as it is kept.

use std::fmt;

use sha2::{Digest, Sha256};

/// The name under which it travels, in HTTP headers and gRPC metadata.
pub const TRACEPARENT: &str = "traceparent";

/// Names a span within its trace. Never zero.
pub type SpanId = [u8; 8];

/// A trace, and the span in it under which what follows belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Of the whole trace; not zero.
    pub trace_id: [u8; 16],
    /// The span.
    pub span_id: SpanId,
    /// The client wants it recorded.
    pub sampled: bool,
}

impl TraceContext {
    /// A new trace under names drawn at random.
    pub fn begin() -> Self {
        Self::from_random(*uuid::Uuid::new_v4().as_bytes())
    }

    /// A new trace under names made of 16 random bytes.
    pub fn from_random(random: [u8; 16]) -> Self {
        // A UUID has bits that are always set: its bytes are never all zero.
        let trace_id = uuid::Builder::from_random_bytes(random).into_uuid().into_bytes();
        Self { trace_id, span_id: derive(&trace_id, &["root"]), sampled: true }
    }

    /// Reads a `traceparent`. One that the W3C calls invalid is none: the caller begins a trace of its own.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace_id) = (hex::<1>(parts.next()?)?, hex::<16>(parts.next()?)?);
        let (span_id, flags) = (hex::<8>(parts.next()?)?, hex::<1>(parts.next()?)?);
        // Later versions may say more behind; this one may not.
        let whole = version[0] != 0 || parts.next().is_none();
        let valid = version[0] != 0xff && trace_id != [0; 16] && span_id != [0; 8];
        (whole && valid).then_some(Self { trace_id, span_id, sampled: flags[0] & 1 == 1 })
    }

    /// The context under a span of this trace that these words name. The same words name the same span, in any process and
    /// after any restart.
    pub fn under(&self, words: &[&str]) -> Self {
        Self { span_id: derive(&self.trace_id, words), ..*self }
    }

    /// The trace's name, in hexadecimal digits.
    pub fn id(&self) -> String {
        digits(&self.trace_id)
    }
}

/// As `traceparent` has it.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", digits(&self.trace_id), digits(&self.span_id), u8::from(self.sampled))
    }
}

fn derive(trace_id: &[u8; 16], words: &[&str]) -> SpanId {
    let mut hash = Sha256::new().chain_update(trace_id);
    for word in words {
        hash.update((word.len() as u64).to_le_bytes());
        hash.update(word);
    }
    let mut id = SpanId::default();
    id.copy_from_slice(&hash.finalize()[..8]);
    // Zero means none; this happens once in a blue moon.
    if id == [0; 8] { [1; 8] } else { id }
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lower case only, as the W3C wants it.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let plain = text.len() == 2 * N && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !plain {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_and_written_as_it_was() {
        let context = TraceContext::parse(GOOD).unwrap();
        assert_eq!(context.to_string(), GOOD);
        assert_eq!(context.id(), "0af7651916cd43dd8448eb211c80319c");
        assert!(!TraceContext::parse(&GOOD.replace("-01", "-00")).unwrap().sampled);
        let later = format!("cc{}-what-comes-later", &GOOD[2..]);
        assert_eq!(TraceContext::parse(&later), Some(context), "a later version may say more");
    }

    #[test]
    fn an_invalid_traceparent_is_none() {
        let upper = GOOD.to_uppercase();
        let (zero_trace, zero_span) = (
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
        );
        let forbidden = format!("ff{}", &GOOD[2..]);
        let longer = format!("{GOOD}-more");
        for bad in ["", "00", "00-1-2-3", &GOOD[..54], &upper, &zero_trace, &zero_span, &forbidden, &longer, "00-é-é-é"] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_same_words_name_the_same_span() {
        let trace = TraceContext::parse(GOOD).unwrap();
        assert_eq!(trace.under(&["job", "a"]), trace.under(&["x"]).under(&["job", "a"]));
        assert_ne!(trace.under(&["job", "a"]), trace.under(&["jo", "ba"]));
        assert_ne!(TraceContext::begin().trace_id, TraceContext::begin().trace_id);
    }
}
