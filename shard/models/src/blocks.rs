//! Networks that are a row of blocks, and how ranks hold them together.
//!
//! A lane of `tp * block_ranges` ranks holds one network: rank = range * tp + index. The `tp` ranks of a range share its
//! tensors; hidden states go from range to range along each index. A group has one lane, or several that each hold the whole
//! network, so that the two passes of classifier-free guidance (or the forwards of two jobs) are done side by side:
//! rank = lane * tp * block_ranges + the rank within the lane. Whatever lane does a forward, its output has the same bits.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use parallel::collective::Placeholder;
use parallel::lora::Activated;
use parallel::mesh::{Link, Mesh};
use parallel::{Collective, Device, Solo, Tensor, Tensors};
use serde::{Deserialize, Serialize};

use crate::control::ControlNetworks;
use crate::lora::Share;
use crate::lora::store::AdapterStore;
use crate::{Error, Result};

/// A network that is a row of blocks, of which this rank holds one range.
///
/// Inputs, hidden states and outputs are tensors by the reference's names; hidden states carry all that the rest of the row
/// needs, so they can leave this process.
pub trait BlockModel: Send {
    /// What comes before the blocks; called on the first range only.
    fn embed(&self, inputs: &Tensors) -> Result<Tensors>;
    /// This rank's blocks.
    fn blocks(&self, hidden: Tensors) -> Result<Tensors>;
    /// What comes after the blocks; called on the last range only.
    fn output(&self, hidden: Tensors) -> Result<Tensors>;
}

/// How a component is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Ranks that share each range's tensors.
    pub tp: usize,
    /// Parts of the row of blocks.
    pub block_ranges: usize,
    /// Lanes: how many times the network is held whole, each cut in the same way.
    #[serde(default = "one")]
    pub cfg_parallel: usize,
}

fn one() -> usize {
    1
}

impl Layout {
    /// One rank.
    pub const SOLO: Layout = Layout::new(1, 1);

    /// One lane.
    pub const fn new(tp: usize, block_ranges: usize) -> Self {
        Self { tp, block_ranges, cfg_parallel: 1 }
    }

    /// As many lanes.
    pub const fn with_cfg_parallel(self, cfg_parallel: usize) -> Self {
        Self { cfg_parallel, ..self }
    }

    /// Ranks in a group of this layout.
    pub fn ranks(self) -> usize {
        self.lane_ranks() * self.cfg_parallel
    }

    /// Ranks that hold the network once.
    pub fn lane_ranks(self) -> usize {
        self.tp * self.block_ranges
    }

    /// The rank of a group that a lane's forwards are handed to: the first of its first range.
    pub fn lane_leader(self, lane: usize) -> usize {
        lane * self.lane_ranks()
    }

    /// The rank of a group that hands a lane's outputs back: the first of its last range.
    pub fn lane_end(self, lane: usize) -> usize {
        (lane + 1) * self.lane_ranks() - self.tp
    }
}

/// As in a picture's provenance: "tp2x2", with lanes "tp2x2xcfg2".
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tp{}x{}", self.tp, self.block_ranges)?;
        if self.cfg_parallel == 1 { Ok(()) } else { write!(f, "xcfg{}", self.cfg_parallel) }
    }
}

/// Which part of a row of blocks a rank holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeOf {
    /// Index of this range.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl RangeOf {
    /// The whole row.
    pub const WHOLE: RangeOf = RangeOf { index: 0, count: 1 };

    /// The blocks of this range when `blocks` are cut as evenly as can be.
    pub fn of(self, blocks: usize) -> Range<usize> {
        self.index * blocks / self.count..(self.index + 1) * blocks / self.count
    }

    /// Whether this range holds what comes before the blocks.
    pub fn is_first(self) -> bool {
        self.index == 0
    }

    /// Whether this range holds what comes after the blocks.
    pub fn is_last(self) -> bool {
        self.index + 1 == self.count
    }
}

/// One rank's view of its group.
#[derive(Clone)]
pub struct RankGroup {
    /// All ranks.
    whole: Arc<dyn Collective>,
    /// The ranks that share this range's tensors.
    pub tensor: Arc<dyn Collective>,
    /// Which range this rank holds.
    pub range: RangeOf,
    /// Where this rank computes. What is handed to it and what it gives is the host's.
    pub device: Device,
    layout: Layout,
    /// This rank's own; none where no adapter is registered.
    adapters: Option<Arc<AdapterStore>>,
    /// This rank's part of them.
    controls: Arc<ControlNetworks>,
}

impl RankGroup {
    /// A group of one.
    pub fn solo() -> Self {
        Self {
            whole: Arc::new(Solo),
            tensor: Arc::new(Solo),
            range: RangeOf::WHOLE,
            device: Device::Cpu,
            layout: Layout::SOLO,
            adapters: None,
            controls: Arc::default(),
        }
    }

    /// This rank's place in a group of `layout` connected by `link`.
    pub fn new(link: Arc<dyn Link>, layout: Layout) -> Result<Self> {
        let (rank, size) = (link.rank(), link.size());
        if size != layout.ranks() || size == 0 {
            return Err(parallel::Error::Frame(format!("{size} ranks cannot be {layout}")).into());
        }
        let whole = Mesh::whole(link);
        let first = rank - rank % layout.tp;
        let peers: Vec<usize> = (first..first + layout.tp).collect();
        let tensor = Arc::new(whole.subgroup(&peers)?);
        Ok(Self { whole: Arc::new(whole), tensor, range: range_of(rank, layout), layout, ..Self::solo() })
    }

    /// A place in a group that exists on paper only: enough to measure what a rank would load.
    pub fn placeholder(rank: usize, layout: Layout) -> Self {
        let whole = Arc::new(Placeholder { rank, size: layout.ranks() });
        let tensor = Arc::new(Placeholder { rank: rank % layout.tp, size: layout.tp });
        Self { whole, tensor, range: range_of(rank, layout), layout, ..Self::solo() }
    }

    /// The same place, computing on `device`.
    pub fn on(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// The same place, with the adapters that jobs may name.
    pub fn with_adapters(self, adapters: Arc<AdapterStore>) -> Self {
        Self { adapters: Some(adapters), ..self }
    }

    /// The same place, with the control networks that jobs may name.
    pub fn with_controls(self, controls: ControlNetworks) -> Self {
        Self { controls: Arc::new(controls), ..self }
    }

    /// This rank's control networks.
    pub fn controls(&self) -> &Arc<ControlNetworks> {
        &self.controls
    }

    /// This rank's adapters, if there are any to name.
    pub fn adapters(&self) -> Option<&AdapterStore> {
        self.adapters.as_deref()
    }

    /// Makes the adapters of a forward active, on every rank of this range or on none. The inner result is the same on all of
    /// them: the first rank's reason why it cannot.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn activate(&self, shares: &[Share]) -> Result<Result<Activated>> {
        let mine = match &self.adapters {
            Some(adapters) => adapters.activate(shares),
            None => {
                let name = shares.iter().flat_map(Share::loras).map(|(name, _)| name).next().unwrap_or_default();
                Err(Error::Adapter { name: name.to_owned(), reason: "this group has no adapters".into() })
            }
        };
        if !self.tensor.any(mine.is_err())? {
            return Ok(mine);
        }
        let reason = mine.err().map(|error| Failure::of(&error));
        for rank in 0..self.tensor.size() {
            let told = broadcast_value(&*self.tensor, (rank == self.tensor.rank()).then_some(&reason), rank)?;
            if let Some(failure) = told {
                return Ok(Err(failure.into()));
            }
        }
        Err(parallel::Error::Frame("a rank cannot use an adapter and gives no reason".into()).into())
    }

    /// Rank 0 leads: it alone knows what to do next.
    pub fn is_leader(&self) -> bool {
        self.whole.rank() == 0
    }

    /// All ranks.
    pub fn whole(&self) -> &dyn Collective {
        &*self.whole
    }

    /// How the group is cut.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Leads a lane: the leader hands it the lane's forwards. The first lane's is the leader itself.
    pub fn is_lane_leader(&self) -> bool {
        self.whole.rank().is_multiple_of(self.layout.lane_ranks())
    }

    /// The rank with this one's index in the next range of its lane; after the last comes the first.
    pub fn next(&self) -> usize {
        self.along_lane(self.layout.tp)
    }

    /// The rank with this one's index in the previous range of its lane.
    pub fn previous(&self) -> usize {
        self.along_lane(self.layout.lane_ranks() - self.layout.tp)
    }

    fn along_lane(&self, ranks: usize) -> usize {
        let (rank, lane) = (self.whole.rank(), self.layout.lane_ranks());
        rank - rank % lane + (rank % lane + ranks) % lane
    }
}

fn range_of(rank: usize, layout: Layout) -> RangeOf {
    RangeOf { index: rank / layout.tp % layout.block_ranges, count: layout.block_ranges }
}

impl fmt::Debug for RankGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RankGroup(rank {} of {})", self.whole.rank(), self.layout)
    }
}

/// Sends named tensors, or the reason why there are none, to another rank.
pub fn send_tensors(comm: &dyn Collective, tensors: &Result<Tensors>, to: usize) -> Result<()> {
    let header = match tensors {
        Ok(tensors) => Header::Tensors(tensors.iter().map(|(name, _)| name.to_owned()).collect()),
        Err(e) => Header::Failed(Failure::of(e)),
    };
    comm.send(&to_tensor(&header)?, to)?;
    if let Ok(tensors) = tensors {
        for (_, tensor) in tensors.iter() {
            comm.send(tensor, to)?;
        }
    }
    Ok(())
}

/// Takes what another rank sent by [`send_tensors`]. The inner result is what that rank's computation came to.
pub fn recv_tensors(comm: &dyn Collective, from: usize) -> Result<Result<Tensors>> {
    match from_tensor(&comm.recv(from)?)? {
        Header::Failed(failure) => Ok(Err(failure.into())),
        Header::Tensors(names) => {
            let tensors = names.into_iter().map(|name| Ok((name, comm.recv(from)?)));
            Ok(Ok(tensors.collect::<Result<Tensors>>()?))
        }
    }
}

/// A value every rank of `comm` gets from `root`, which alone gives it.
pub fn broadcast_value<T: Serialize + for<'a> Deserialize<'a>>(
    comm: &dyn Collective,
    value: Option<&T>,
    root: usize,
) -> Result<T> {
    let tensor = value.map(to_tensor).transpose()?;
    from_tensor(&comm.broadcast(tensor.as_ref(), root)?)
}

/// Named tensors every rank of `comm` gets from `root`, which alone gives them.
pub fn broadcast_tensors(comm: &dyn Collective, tensors: Option<&Tensors>, root: usize) -> Result<Tensors> {
    let names: Option<Vec<String>> = tensors.map(|t| t.iter().map(|(name, _)| name.to_owned()).collect());
    let names = broadcast_value(comm, names.as_ref(), root)?;
    let each = names.into_iter().map(|name| {
        let mine = tensors.and_then(|t| t.find(&name));
        let tensor = comm.broadcast(mine, root)?;
        Ok((name, tensor))
    });
    each.collect()
}

#[derive(Serialize, Deserialize)]
enum Header {
    Tensors(Vec<String>),
    Failed(Failure),
}

/// Why a rank could not do its part, as it travels.
#[derive(Serialize, Deserialize)]
struct Failure {
    /// The adapter that was the cause.
    adapter: Option<String>,
    reason: String,
}

impl Failure {
    fn of(error: &Error) -> Self {
        match error {
            Error::Adapter { name, reason } => Self { adapter: Some(name.clone()), reason: reason.clone() },
            error => Self { adapter: None, reason: error.to_string() },
        }
    }
}

impl From<Failure> for Error {
    fn from(Failure { adapter, reason }: Failure) -> Self {
        match adapter {
            Some(name) => Error::Adapter { name, reason },
            None => Error::Rank { reason },
        }
    }
}

pub(crate) fn to_tensor<T: Serialize>(value: &T) -> Result<Tensor> {
    let bytes = serde_json::to_vec(value).map_err(|e| parallel::Error::Frame(e.to_string()))?;
    let len = bytes.len();
    Ok(Tensor::from_vec(bytes, len, &Device::Cpu)?)
}

pub(crate) fn from_tensor<T: for<'a> Deserialize<'a>>(tensor: &Tensor) -> Result<T> {
    let bytes = tensor.to_vec1::<u8>()?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Parallel(parallel::Error::Frame(e.to_string())))
}
