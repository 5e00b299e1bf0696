//! Which worker holds which rank of which group, and which group runs which stage of a job.
//!
//! Pure: no clock, no socket, no log. What stands is kept; the same inputs give the same answer.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::{Layout, ModelCard, Products, Registration, StageKind};

use crate::{
    models_file::{ComponentConfig, ModelConfig},
    plan::Plan,
};

/// A group that models.toml asks for: one replica of one component of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedGroup {
    /// `model/component/replica`.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// The component it holds.
    pub component: String,
    /// How the component is cut.
    pub layout: Layout,
    /// What it is multiplied in.
    pub products: Products,
    /// Labels a member must have.
    pub selector: BTreeMap<String, String>,
    /// A worker may hold several of its ranks, and ranks of several replicas.
    pub colocate: bool,
}

impl WantedGroup {
    /// It holds the same as `other`, and shares no worker with it.
    pub fn excludes(&self, other: &Self) -> bool {
        !self.colocate && component_of(&self.id) == component_of(&other.id)
    }

    /// How many ranks it has.
    pub fn size(&self) -> usize {
        self.layout.ranks() as usize
    }

    /// `worker` has every label the group asks for, and can multiply as it does.
    pub fn accepts(&self, worker: &Registration) -> bool {
        let has = |(label, value): (&String, &String)| worker.labels.get(label) == Some(value);
        self.selector.iter().all(has) && worker.products().any(|products| products == self.products)
    }
}

/// The label that says which workers share a machine.
const HOST: &str = "host";
/// The device that several ranks may share.
const CPU: &str = "cpu";

/// What all replicas of a component have in common of their groups' ids: `model/component`.
fn component_of(group_id: &str) -> &str {
    group_id.rsplit_once('/').map_or(group_id, |(component, _)| component)
}

/// Workers in rank order, for one group.
pub type Members = Vec<String>;

/// The groups a model needs, or the field of models.toml that does not fit its card.
pub fn wanted_groups(model: &ModelConfig, card: &ModelCard) -> Result<Vec<WantedGroup>, String> {
    let named: BTreeSet<&str> = card.components.iter().map(|component| component.name.as_str()).collect();
    let problem = |text: String| format!("model {:?}: components.{text}", model.name);
    if let Some(unknown) = model.components.keys().find(|name| !named.contains(name.as_str())) {
        let known: Vec<&str> = named.into_iter().collect();
        return Err(problem(format!("{unknown}: the model has no such component, only {}", known.join(", "))));
    }
    let mut wanted = Vec::new();
    for component in &card.components {
        let name = &component.name;
        let config = model.components.get(name).cloned().unwrap_or_default();
        if !component.tp_options.contains(&config.tp) {
            let options: Vec<String> = component.tp_options.iter().map(u32::to_string).collect();
            let text = format!("{name}.tp = {}: must be one of {}", config.tp, options.join(", "));
            return Err(problem(text));
        }
        let most = component.max_block_ranges.max(1);
        if config.block_ranges > most {
            let text = format!("{name}.block_ranges = {}: must be at most {most}", config.block_ranges);
            return Err(problem(text));
        }
        let denoises = card.stages.iter().any(|stage| stage.kind() == StageKind::Denoise && stage.component == *name);
        if config.cfg_parallel > 1 && !denoises {
            return Err(problem(format!("{name}.cfg_parallel = {}: only for a component that denoises", config.cfg_parallel)));
        }
        wanted.extend((0..config.replicas).map(|replica| wanted_group(model, name, &config, replica)));
    }
    Ok(wanted)
}

fn wanted_group(model: &ModelConfig, component: &str, config: &ComponentConfig, replica: u32) -> WantedGroup {
    WantedGroup {
        id: format!("{}/{component}/{replica}", model.name),
        model: model.name.clone(),
        component: component.to_owned(),
        layout: config.layout(),
        products: model.products,
        selector: config.workers.clone(),
        colocate: config.colocate,
    }
}

/// Members for each wanted group that does not stand and for which there are workers enough, in the order wanted.
///
/// Ranks go to the workers that hold the fewest. A worker holds one replica of a component at most, unless they may be
/// colocated: a second one on the same device would cost its memory again and make nothing faster. So there may be more
/// replicas wanted than there are workers for; they form when workers come. Groups in `standing` are left as they are. `passed_over` has workers that
/// could not load a group, by its id: others go before them.
pub fn form_groups<'a>(
    wanted: &'a [WantedGroup],
    workers: &'a BTreeMap<String, Registration>,
    standing: &'a BTreeMap<String, Members>,
    passed_over: &BTreeMap<String, BTreeSet<String>>,
) -> Vec<(String, Members)> {
    let mut ranks: BTreeMap<&str, usize> = workers.keys().map(|id| (id.as_str(), 0)).collect();
    for member in standing.values().flatten() {
        if let Some(count) = ranks.get_mut(member.as_str()) {
            *count += 1;
        }
    }
    let holds = |(id, members): (&'a String, &'a Members)| members.iter().map(move |member| (component_of(id), member.as_str()));
    let mut holders: BTreeSet<(&str, &str)> = standing.iter().flat_map(holds).collect();
    let mut formed = Vec::new();
    for group in wanted.iter().filter(|group| !standing.contains_key(&group.id)) {
        let component = component_of(&group.id);
        let accepted = workers.iter().map(|(id, worker)| (id.as_str(), worker)).filter(|(_, worker)| group.accepts(worker));
        let free = |id: &str| group.colocate || !holders.contains(&(component, id));
        let eligible: Vec<(&str, &Registration)> = accepted.filter(|(id, _)| free(id)).collect();
        let is_passed_over = |id: &str| passed_over.get(&group.id).is_some_and(|workers| workers.contains(id));
        if let Some(members) = choose_members(group, &eligible, is_passed_over, &mut ranks) {
            holders.extend(members.iter().map(|member| (component, *member)));
            formed.push((group.id.clone(), members.into_iter().map(str::to_owned).collect()));
        }
    }
    formed
}

/// All ranks of a group or none; `ranks` counts what each worker holds and is changed only if all are found.
///
/// All of one kind of device, which have a way to each other. CPUs where no other kind suffices, those that are passed over included.
fn choose_members<'a>(
    group: &WantedGroup,
    eligible: &[(&'a str, &'a Registration)],
    is_passed_over: impl Fn(&str) -> bool,
    ranks: &mut BTreeMap<&'a str, usize>,
) -> Option<Vec<&'a str>> {
    let kind_of = |worker: &'a Registration| {
        let kind = worker.device.split(':').next().unwrap_or_default();
        (kind == CPU, kind)
    };
    let mut kinds: BTreeMap<_, Vec<(&str, &Registration)>> = BTreeMap::new();
    for (id, worker) in eligible {
        kinds.entry(kind_of(worker)).or_default().push((id, worker));
    }
    kinds.into_values().find_map(|workers| {
        let others: Vec<_> = workers.iter().copied().filter(|(id, _)| !is_passed_over(id)).collect();
        seat_ranges(group, &others, ranks).or_else(|| seat_ranges(group, &workers, ranks))
    })
}

/// The ranks of each block range on one host, as long as there is one with room for them: they add up at every layer, while
/// one block range hands to the next once a forward. What is left goes to any host.
fn seat_ranges<'a>(
    group: &WantedGroup,
    workers: &[(&'a str, &'a Registration)],
    ranks: &mut BTreeMap<&'a str, usize>,
) -> Option<Vec<&'a str>> {
    let mut hosts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (id, worker) in workers {
        // Those that do not say where they are count as one host.
        hosts.entry(worker.labels.get(HOST).map_or("", String::as_str)).or_default().push(id);
    }
    let everywhere: Vec<&str> = workers.iter().map(|(id, _)| *id).collect();
    let colocate = group.colocate && workers.iter().all(|(_, worker)| worker.device == CPU);
    let (tp, mut counts, mut members) = (group.layout.tp as usize, ranks.clone(), Vec::new());
    for _ in 0..group.layout.block_ranges * group.layout.lanes() {
        let free = |workers: &[&'a str]| -> Vec<&'a str> {
            workers.iter().copied().filter(|id| colocate || !members.contains(id)).collect()
        };
        let on_one = hosts.values().filter_map(|workers| least_held(&free(workers), tp, colocate, &counts)).min();
        let (_, range) = on_one.or_else(|| least_held(&free(&everywhere), tp, colocate, &counts))?;
        range.iter().for_each(|id| *counts.entry(id).or_default() += 1);
        members.extend(range);
    }
    *ranks = counts;
    Some(members)
}

/// `tp` of `workers` that hold the fewest ranks, and how many they hold together; one may be taken again if they `colocate`.
fn least_held<'a>(
    workers: &[&'a str],
    tp: usize,
    colocate: bool,
    counts: &BTreeMap<&'a str, usize>,
) -> Option<(usize, Vec<&'a str>)> {
    let mut held: BTreeMap<&str, usize> = workers.iter().map(|id| (*id, counts.get(id).copied().unwrap_or_default())).collect();
    let (mut sum, mut chosen) = (0, Vec::new());
    while chosen.len() < tp {
        let (&next, &count) = held.iter().min_by_key(|(id, count)| (**count, **id))?;
        sum += count;
        chosen.push(next);
        if colocate {
            held.insert(next, count + 1);
        } else {
            held.remove(next);
        }
    }
    Some((sum, chosen))
}

/// A group as seen by [`place`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica<'a> {
    /// Its id.
    pub group_id: &'a str,
    /// The component it holds.
    pub component: &'a str,
    /// Tasks it has now.
    pub tasks: usize,
    /// Most tasks it may have.
    pub limit: usize,
}

/// Which group runs each stage of a job, by stage id.
pub type Placement = BTreeMap<String, String>;

/// Gives each stage the ready replica with the fewest tasks, or nothing if one stage finds none with room.
pub fn place(plan: &Plan, ready: &[Replica<'_>]) -> Option<Placement> {
    let mut replicas = ready.to_vec();
    let mut placement = Placement::new();
    for stage in &plan.stages {
        let chosen = replicas
            .iter_mut()
            .filter(|replica| replica.component == stage.component && replica.tasks < replica.limit)
            .min_by_key(|replica| (replica.tasks, replica.group_id))?;
        chosen.tasks += 1;
        placement.insert(stage.id.clone(), chosen.group_id.to_owned());
    }
    Some(placement)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn form_groups(
        wanted: &[WantedGroup],
        workers: &BTreeMap<String, Registration>,
        standing: &BTreeMap<String, Members>,
    ) -> Vec<(String, Members)> {
        super::form_groups(wanted, workers, standing, &BTreeMap::new())
    }

    fn model(components: &[(&str, ComponentConfig)]) -> ModelConfig {
        ModelConfig {
            name: "emoji".into(),
            path: PathBuf::from("/models/emoji"),
            refiner: None,
            max_batch: 4,
            max_jobs: 16,
            products: Products::F32,
            components: components.iter().map(|(name, config)| ((*name).to_owned(), config.clone())).collect(),
            adapters: vec![],
            controls: vec![],
        }
    }

    fn problem(component: &str, config: ComponentConfig) -> String {
        wanted_groups(&model(&[(component, config)]), &testing::card("emoji")).unwrap_err()
    }

    #[test]
    fn a_component_that_is_not_mentioned_has_one_whole_group() {
        let wanted = wanted_groups(&model(&[]), &testing::card("emoji")).unwrap();
        let ids: Vec<_> = wanted.iter().map(|group| group.id.as_str()).collect();
        assert_eq!(ids, ["emoji/text_encoder/0", "emoji/transformer/0", "emoji/vae/0"]);
        assert!(wanted.iter().all(|group| group.size() == 1));
    }

    #[test]
    fn what_does_not_fit_the_card_is_named_by_field() {
        let tp = |tp| ComponentConfig { tp, ..ComponentConfig::default() };
        let ranges = |block_ranges| ComponentConfig { block_ranges, ..ComponentConfig::default() };
        assert_eq!(problem("transformer", tp(3)), "model \"emoji\": components.transformer.tp = 3: must be one of 1, 2, 4, 8");
        assert_eq!(
            problem("transformer", ranges(5)),
            "model \"emoji\": components.transformer.block_ranges = 5: must be at most 4"
        );
        assert_eq!(
            problem("text_encoder", ComponentConfig { cfg_parallel: 2, ..ComponentConfig::default() }),
            "model \"emoji\": components.text_encoder.cfg_parallel = 2: only for a component that denoises"
        );
        assert_eq!(
            problem("unet", tp(1)),
            "model \"emoji\": components.unet: the model has no such component, only text_encoder, transformer, vae"
        );
    }

    fn workers(roles: &[&str]) -> BTreeMap<String, Registration> {
        let worker = |(index, role): (usize, &&str)| {
            let id = format!("w{index}");
            (id.clone(), testing::worker(&id, role))
        };
        roles.iter().enumerate().map(worker).collect()
    }

    #[test]
    fn a_group_has_all_ranks_of_all_its_lanes() {
        let config = ComponentConfig { tp: 2, block_ranges: 2, cfg_parallel: 2, ..ComponentConfig::default() };
        let wanted = wanted_groups(&model(&[("transformer", config)]), &testing::card("emoji")).unwrap();
        let transformer: Vec<_> = wanted.into_iter().filter(|group| group.component == "transformer").collect();
        assert_eq!(transformer[0].size(), 8);
        assert_eq!(form_groups(&transformer, &workers(&["x"; 7]), &BTreeMap::new()), [], "seven workers are too few");
        let formed = form_groups(&transformer, &workers(&["x"; 8]), &BTreeMap::new());
        assert_eq!(formed[0].1.iter().collect::<BTreeSet<_>>().len(), 8);
    }

    fn group(id: &str, (tp, cfg_parallel): (u32, u32), role: Option<&str>, colocate: bool) -> WantedGroup {
        WantedGroup {
            id: id.into(),
            model: "emoji".into(),
            component: "transformer".into(),
            layout: Layout { tp, block_ranges: 1, cfg_parallel },
            products: Products::F32,
            selector: role.map(|role| ("role".to_owned(), role.to_owned())).into_iter().collect(),
            colocate,
        }
    }

    #[test]
    fn ranks_go_to_the_workers_that_hold_the_fewest() {
        let wanted = [group("a", (1, 2), None, false), group("b", (1, 1), None, false), group("c", (1, 0), None, false)];
        let formed = form_groups(&wanted, &workers(&["x", "x", "x"]), &BTreeMap::new());
        assert_eq!(formed[0].1, ["w0", "w1"]);
        assert_eq!(formed[1].1, ["w2"]);
        assert_eq!(formed[2].1, ["w0"]);
    }

    /// Workers `w0`, `w1`, ... on the given hosts, each with a GPU.
    fn on_hosts(hosts: &[&str]) -> BTreeMap<String, Registration> {
        let mut workers = workers(&vec!["x"; hosts.len()]);
        for (worker, host) in workers.values_mut().zip(hosts) {
            worker.device = "cuda:0".into();
            worker.labels.insert(HOST.into(), (*host).to_owned());
        }
        workers
    }

    fn cut(id: &str, tp: u32, block_ranges: u32) -> WantedGroup {
        WantedGroup { layout: Layout { tp, block_ranges, cfg_parallel: 1 }, ..group(id, (tp, 1), None, false) }
    }

    #[test]
    fn the_ranks_of_a_block_range_are_on_one_host_where_they_can_be() {
        let workers = on_hosts(&["a", "b", "b", "a", "c"]);
        let formed =
            |tp, ranges| form_groups(&[cut("g", tp, ranges)], &workers, &BTreeMap::new()).pop().map(|(_, members)| members);
        assert_eq!(formed(2, 1).unwrap(), ["w0", "w3"]);
        assert_eq!(formed(2, 2).unwrap(), ["w0", "w3", "w1", "w2"], "another host for the next range");
        assert_eq!(formed(4, 1).unwrap(), ["w0", "w1", "w2", "w3"], "no host has four");
        assert_eq!(formed(2, 3), None, "a sixth is missing");
    }

    #[test]
    fn a_host_that_holds_less_goes_before_one_that_holds_more() {
        let workers = on_hosts(&["a", "a", "b", "b"]);
        let formed = form_groups(&[cut("g", 2, 1), cut("h", 2, 1), cut("i", 1, 1)], &workers, &BTreeMap::new());
        let members: Vec<_> = formed.into_iter().map(|(_, members)| members).collect();
        assert_eq!(members, [vec!["w0", "w1"], vec!["w2", "w3"], vec!["w0"]]);
    }

    #[test]
    fn a_group_goes_only_to_workers_that_can_multiply_as_its_model_says() {
        let mut workers = workers(&["x"; 4]);
        let able: [&[Products]; 4] =
            [&[Products::F32], &[Products::F32, Products::Bf16], &[], &[Products::Amx, Products::Bf16, Products::F32]];
        for (worker, able) in workers.values_mut().zip(able) {
            worker.products = able.iter().map(|products| *products as i32).collect();
        }
        let formed = |products, tp| {
            let wanted = wanted_groups(
                &ModelConfig { products, ..model(&[("transformer", ComponentConfig { tp, ..ComponentConfig::default() })]) },
                &testing::card("emoji"),
            );
            let transformer: Vec<_> = wanted.unwrap().into_iter().filter(|group| group.component == "transformer").collect();
            form_groups(&transformer, &workers, &BTreeMap::new()).pop().map(|(_, members)| members)
        };
        assert_eq!(formed(Products::Bf16, 2).unwrap(), ["w1", "w3"]);
        assert_eq!(formed(Products::Amx, 1).unwrap(), ["w3"]);
        assert_eq!(formed(Products::F32, 2).unwrap(), ["w0", "w1"]);
        for (products, tp) in [(Products::Amx, 2), (Products::Bf16, 4), (Products::F32, 4), (Products::Int8, 1)] {
            assert_eq!(formed(products, tp), None, "{products} at tp {tp}: one that cannot, or does not say, is not taken");
        }
    }

    #[test]
    fn a_group_computes_on_one_kind_of_device_and_shares_no_gpu() {
        let mut mixed = on_hosts(&["a", "a", "a"]);
        mixed.get_mut("w0").unwrap().device = CPU.into();
        let formed = |tp, colocate| {
            let wanted = WantedGroup { colocate, ..cut("g", tp, 1) };
            form_groups(&[wanted], &mixed, &BTreeMap::new()).pop().map(|(_, members)| members)
        };
        assert_eq!(formed(2, false).unwrap(), ["w1", "w2"]);
        assert_eq!(formed(4, false), None);
        assert_eq!(formed(4, true).unwrap(), ["w0"; 4], "ranks share the CPU, not the GPUs");
    }

    #[test]
    fn workers_that_could_not_load_a_group_are_taken_only_where_no_others_are() {
        let (wanted, standing) = ([group("a", (2, 1), None, false)], BTreeMap::new());
        let passed_over = BTreeMap::from([("a".to_owned(), BTreeSet::from(["w0".to_owned()]))]);
        let formed = |count| {
            super::form_groups(&wanted, &workers(&vec!["x"; count]), &standing, &passed_over).pop().map(|(_, members)| members)
        };
        assert_eq!(formed(3).unwrap(), ["w1", "w2"]);
        assert_eq!(formed(2).unwrap(), ["w0", "w1"]);
        assert_eq!(formed(1), None);
    }

    #[test]
    fn a_group_on_gpus_stays_there_though_one_of_them_could_not_load_it() {
        let mut workers = on_hosts(&["a", "a", "b", "b"]);
        for id in ["w2", "w3"] {
            workers.get_mut(id).unwrap().device = CPU.into();
        }
        let passed_over = |ids: &[&str]| BTreeMap::from([("g".to_owned(), ids.iter().map(|id| (*id).to_owned()).collect())]);
        let formed = |tp, ids: &[&str]| {
            super::form_groups(&[cut("g", tp, 1)], &workers, &BTreeMap::new(), &passed_over(ids))
                .pop()
                .map(|(_, members)| members)
        };
        assert_eq!(formed(2, &["w0"]).unwrap(), ["w0", "w1"]);
        assert_eq!(formed(1, &["w0"]).unwrap(), ["w1"]);
        assert_eq!(formed(1, &["w0", "w1"]).unwrap(), ["w0"]);
    }

    #[test]
    fn a_joining_worker_moves_no_standing_group() {
        let wanted = [group("a", (2, 1), None, false), group("b", (1, 1), None, false)];
        let standing = form_groups(&wanted, &workers(&["x", "x"]), &BTreeMap::new()).into_iter().collect();
        assert_eq!(form_groups(&wanted, &workers(&["x", "x", "x"]), &standing), []);
    }

    #[test]
    fn replicas_of_a_component_share_no_worker_and_form_as_workers_come() {
        let replicas = |colocate| ["m/t/0", "m/t/1", "m/t/2"].map(|id| group(id, (1, 1), None, colocate));
        let wanted = replicas(false);
        let first: BTreeMap<_, _> = form_groups(&wanted, &workers(&["x"]), &BTreeMap::new()).into_iter().collect();
        assert_eq!(first, BTreeMap::from([("m/t/0".to_owned(), vec!["w0".to_owned()])]));
        let next = form_groups(&wanted, &workers(&["x", "x"]), &first);
        assert_eq!(next, [("m/t/1".to_owned(), vec!["w1".to_owned()])]);
        let other = [group("m/v/0", (1, 1), None, false)];
        assert_eq!(form_groups(&other, &workers(&["x"]), &first)[0].1, ["w0"], "another component may be beside it");
        assert_eq!(form_groups(&replicas(true), &workers(&["x"]), &BTreeMap::new()).len(), 3);
    }

    #[test]
    fn a_stage_goes_to_the_replica_with_the_fewest_tasks_and_room() {
        let stage = |id: &str, component: &str| crate::plan::Stage {
            id: id.into(),
            kind: proto::v1::StageKind::Denoise,
            component: component.into(),
            with_pictures: false,
            with_controls: false,
            inputs: vec![],
        };
        let plan = Plan { stages: vec![stage("denoise", "transformer"), stage("decode", "vae")] };
        let replica = |group_id, component, tasks, limit| Replica { group_id, component, tasks, limit };
        let mut replicas =
            vec![replica("t0", "transformer", 3, 16), replica("t1", "transformer", 1, 1), replica("v", "vae", 9, 16)];
        let placement = place(&plan, &replicas).unwrap();
        assert_eq!((placement["denoise"].as_str(), placement["decode"].as_str()), ("t0", "v"));
        replicas[2].limit = 9;
        assert_eq!(place(&plan, &replicas), None, "all stages are placed or none");
    }

    fn any_group() -> impl Strategy<Value = ((u32, u32), Option<&'static str>, bool)> {
        let role = prop::option::of(prop::sample::select(vec!["x", "y"]));
        ((prop::sample::select(vec![1u32, 2, 4, 8]), 0u32..3), role, any::<bool>())
    }

    fn any_cluster() -> impl Strategy<Value = (Vec<WantedGroup>, BTreeMap<String, Registration>)> {
        let groups = prop::collection::vec(any_group(), 0..8);
        let roles = prop::collection::vec(prop::sample::select(vec!["x", "y", "z"]), 0..10);
        (groups, roles).prop_map(|(groups, roles)| {
            let wanted = groups
                .into_iter()
                .enumerate()
                .map(|(index, (cut, role, colocate))| group(&format!("g{index}"), cut, role, colocate))
                .collect();
            (wanted, workers(&roles))
        })
    }

    proptest! {
        #[test]
        fn formed_groups_are_whole_and_their_members_fit((wanted, workers) in any_cluster()) {
            for (id, members) in form_groups(&wanted, &workers, &BTreeMap::new()) {
                let group = wanted.iter().find(|group| group.id == id).unwrap();
                prop_assert_eq!(members.len(), group.size());
                prop_assert!(members.iter().all(|member| group.accepts(&workers[member])));
                let distinct: BTreeSet<_> = members.iter().collect();
                prop_assert!(group.colocate || distinct.len() == members.len());
            }
        }

        #[test]
        fn a_group_waits_only_for_want_of_workers((wanted, workers) in any_cluster()) {
            let formed: BTreeMap<_, _> = form_groups(&wanted, &workers, &BTreeMap::new()).into_iter().collect();
            for group in wanted.iter().filter(|group| !formed.contains_key(&group.id)) {
                let eligible = workers.values().filter(|worker| group.accepts(worker)).count();
                let needed = if group.colocate { 1 } else { group.size() };
                prop_assert!(eligible < needed);
            }
        }

        #[test]
        fn forming_again_forms_nothing((wanted, workers) in any_cluster()) {
            let standing = form_groups(&wanted, &workers, &BTreeMap::new()).into_iter().collect();
            prop_assert_eq!(form_groups(&wanted, &workers, &standing), vec![]);
        }

        #[test]
        fn losing_a_worker_touches_only_its_groups((wanted, workers) in any_cluster()) {
            let before: BTreeMap<_, _> = form_groups(&wanted, &workers, &BTreeMap::new()).into_iter().collect();
            let mut rest = workers;
            let Some((lost, _)) = rest.pop_first() else { return Ok(()) };
            let standing: BTreeMap<_, _> =
                before.into_iter().filter(|(_, members)| !members.contains(&lost)).collect();
            for (id, members) in form_groups(&wanted, &rest, &standing) {
                prop_assert!(!standing.contains_key(&id));
                prop_assert!(!members.contains(&lost));
            }
        }

        #[test]
        fn ranks_of_groups_that_take_any_worker_are_spread_evenly(
            sizes in prop::collection::vec(prop::sample::select(vec![1u32, 2, 4]), 1..8),
            count in 4usize..10,
        ) {
            let wanted: Vec<_> =
                sizes.iter().enumerate().map(|(i, tp)| group(&format!("g{i}"), (*tp, 1), None, false)).collect();
            let formed = form_groups(&wanted, &workers(&vec!["x"; count]), &BTreeMap::new());
            let mut held: BTreeMap<String, usize> = (0..count).map(|i| (format!("w{i}"), 0)).collect();
            for member in formed.iter().flat_map(|(_, members)| members) {
                *held.get_mut(member).unwrap() += 1;
            }
            let (least, most) = (held.values().min().unwrap(), held.values().max().unwrap());
            prop_assert!(most - least <= 1, "{held:?}");
        }
    }
}
