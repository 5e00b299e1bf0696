//! What each tenant may use, and what it uses.
//!
//! Work is counted in pixel-steps: width times height times steps times pictures. A tenant's quota is a bucket of them that
//! fills at a rate; a job is taken while the bucket holds as much as it needs, or is full: so a job larger than the bucket is
//! taken too, and the tenant pays it back by waiting. The bucket is not written down: a new coordinator begins with full ones.

use std::{collections::BTreeMap, sync::Arc};

use super::Millis;

/// Seconds of quota that a bucket holds when nobody says: a minute.
pub const DEFAULT_BURST_SECONDS: u64 = 60;
/// The largest weight: shares finer than a thousandth are nobody's wish.
pub const MAX_WEIGHT: u32 = 1000;

/// What a tenant may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantLimits {
    /// Its share of what there is, against others' in the queue: 1 to [`MAX_WEIGHT`].
    pub weight: u32,
    /// Work over time.
    pub quota: Option<Quota>,
    /// Jobs that run at a time; more wait.
    pub max_running: Option<usize>,
    /// Jobs that wait at a time; more are refused.
    pub max_queued: Option<usize>,
}

impl Default for TenantLimits {
    fn default() -> Self {
        Self { weight: 1, quota: None, max_running: None, max_queued: None }
    }
}

/// Work over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Pixel-steps a second, at least 1.
    pub per_second: u64,
    /// Pixel-steps that may come at once.
    pub burst: u64,
}

/// Every tenant that is known.
#[derive(Debug, Default)]
pub(super) struct Tenants(BTreeMap<Arc<str>, Held>);

#[derive(Debug, Default)]
struct Held {
    limits: TenantLimits,
    /// Thousandths of pixel-steps that lack in the bucket.
    lack: u128,
    /// When that was so.
    seen: Millis,
    running: usize,
}

impl Tenants {
    /// What they may use from now on; a tenant that is not named may use anything.
    pub(super) fn set(&mut self, mut limits: BTreeMap<String, TenantLimits>) {
        for (name, held) in &mut self.0 {
            held.limits = limits.remove(&**name).unwrap_or_default();
        }
        self.0.extend(limits.into_iter().map(|(name, limits)| (name.into(), Held { limits, ..Held::default() })));
        self.0.retain(|_, held| held.running > 0 || held.limits != TenantLimits::default());
    }

    pub(super) fn limits(&self, name: &str) -> TenantLimits {
        self.0.get(name).map(|held| held.limits.clone()).unwrap_or_default()
    }

    /// Takes work out of the bucket, or says after how many milliseconds there will be enough.
    pub(super) fn charge(&mut self, name: &str, work: u64, now: Millis) -> Result<(), Millis> {
        let Some(held) = self.0.get_mut(name) else {
            return Ok(());
        };
        let Some(quota) = held.limits.quota else {
            return Ok(());
        };
        let (rate, burst) = (u128::from(quota.per_second.max(1)), u128::from(quota.burst) * 1000);
        // Thousandths a millisecond are as many as whole ones a second.
        held.lack = held.lack.saturating_sub(rate * u128::from(now.saturating_sub(held.seen)));
        held.seen = now;
        let work = u128::from(work) * 1000;
        let may_lack = burst.saturating_sub(work);
        if held.lack > may_lack {
            return Err(u64::try_from((held.lack - may_lack).div_ceil(rate)).unwrap_or(u64::MAX));
        }
        held.lack += work;
        Ok(())
    }

    /// A job of the tenant was placed.
    pub(super) fn placed(&mut self, name: &Arc<str>) {
        self.0.entry(name.clone()).or_default().running += 1;
    }

    /// A job of the tenant, which was placed, is not any more.
    pub(super) fn unplaced(&mut self, name: &str) {
        if let Some(held) = self.0.get_mut(name) {
            held.running = held.running.saturating_sub(1);
        }
    }

    /// Whether as many of its jobs run as may.
    pub(super) fn is_at_cap(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|held| held.limits.max_running.is_some_and(|most| held.running >= most))
    }

    /// Every tenant, by name.
    pub(super) fn names(&self) -> Vec<Arc<str>> {
        self.0.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_burst_and_then_its_rate_and_says_when_to_come_back() {
        let quota = Some(Quota { per_second: 100, burst: 500 });
        let mut tenants = Tenants::default();
        tenants.set([("a".to_owned(), TenantLimits { quota, ..TenantLimits::default() })].into());
        for _ in 0..5 {
            assert_eq!(tenants.charge("a", 100, 1000), Ok(()));
        }
        assert_eq!(tenants.charge("a", 100, 1000), Err(1000));
        assert_eq!(tenants.charge("a", 100, 1999), Err(1));
        assert_eq!(tenants.charge("a", 100, 2000), Ok(()));
        // One that is larger than the bucket waits until that is full, and is paid back.
        assert_eq!(tenants.charge("a", 2000, 6999), Err(1));
        assert_eq!(tenants.charge("a", 2000, 7000), Ok(()));
        assert_eq!(tenants.charge("a", 100, 7000), Err(16_000));
        assert_eq!(tenants.charge("somebody else", u64::MAX, 0), Ok(()));
    }
}
