use crate::{
    key::{DRIVER, KeyKind, Layout, PartitionId, SEED_INDEX},
    placement::{
        Command, CreateKeyspace, Cuts, Refusal, Reply, State, Step,
        plan::tests::arrive,
        state::tests::{changes_nothing, cluster},
    },
};
use bytes::Bytes;
use std::collections::BTreeSet;

/// A state with a keyspace of one partition on three nodes, at rest.
fn whole() -> (State, PartitionId) {
    let mut state = cluster(3);
    let create = CreateKeyspace {
        name: "x".to_owned(),
        kind: KeyKind::Bytes,
        layout: Layout::Ordered,
        replicas: 3,
        cuts: Cuts::Even(1),
        avoid: BTreeSet::new(),
    };
    state.apply(Command::CreateKeyspace(create)).expect("new");
    let keyspace = state.map().keyspace_by_name("x").expect("made").id;
    let id = state.map().partitions_of(keyspace).next().expect("one").id;
    arrive(&mut state);
    (state, id)
}

fn divide(partition: PartitionId, at: &'static [u8]) -> Command {
    Command::Divide { partition, bounds: 1, at: Bytes::from_static(at) }
}

fn cut(state: &mut State, id: PartitionId, at: &'static [u8]) -> PartitionId {
    match state.apply(divide(id, at)) {
        Ok(Reply::Dividing { child }) => child,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_cut_is_handed_out_and_then_takes_place() {
    let (mut state, id) = whole();
    let before = state.map().partition(id).expect("there").clone();
    let child = cut(&mut state, id, b"m");
    assert_eq!(state.map().check(), Ok(()));
    assert!(state.map().partition(child).is_none(), "nobody is sent there yet");
    assert!(!state.map().partition(id).expect("there").is_at_rest());
    let again = changes_nothing(&mut state, divide(id, b"m"));
    assert_eq!(again, Ok(Reply::Dividing { child }), "asked twice, done once");
    assert!(matches!(changes_nothing(&mut state, divide(id, b"n")), Err(Refusal::StepOutdated { .. })));
    let decoded = State::decode(&state.encode()).expect("sound");
    assert_eq!(decoded.encode(), state.encode());

    let done = Command::Divided { partition: id, child };
    assert_eq!(state.apply(done.clone()), Ok(Reply::Dividing { child }));
    let (left, right) = (state.map().partition(id).expect("there"), state.map().partition(child).expect("born"));
    assert_eq!((left.span.end.as_deref(), &*right.span.start, &right.span.end), (Some(&b"m"[..]), &b"m"[..], &None));
    assert_eq!((left.epoch.bounds, right.epoch.bounds, right.epoch.members), (2, 2, SEED_INDEX));
    assert_eq!((&left.members, &left.birth), (&before.members, &before.birth));
    let nodes = |p: &crate::placement::Partition| p.members.iter().map(|replica| replica.node).collect::<Vec<_>>();
    assert_eq!(nodes(left), nodes(right));
    assert!(left.is_at_rest() && right.is_at_rest());
    assert_eq!(state.map().check(), Ok(()));
    assert_eq!(changes_nothing(&mut state, done), Ok(Reply::Dividing { child }));
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let (mut state, id) = whole();
    for (partition, at) in [(DRIVER, &b"m"[..]), (id, b"")] {
        let command = Command::Divide { partition, bounds: 1, at: Bytes::copy_from_slice(at) };
        assert!(matches!(changes_nothing(&mut state, command), Err(Refusal::CutImpossible { .. })));
    }
    let late = Command::Divide { partition: id, bounds: 2, at: Bytes::from_static(b"m") };
    assert!(matches!(changes_nothing(&mut state, late), Err(Refusal::StepOutdated { .. })));
    let unknown = Command::Divided { partition: id, child: PartitionId(99) };
    assert!(matches!(changes_nothing(&mut state, unknown), Err(Refusal::StepOutdated { .. })));
}

#[test]
fn members_stay_while_a_partition_is_being_cut() {
    let (mut state, id) = whole();
    cut(&mut state, id, b"m");
    let partition = state.map().partition(id).expect("there");
    let nodes = partition.members.iter().take(2).map(|replica| replica.node).collect();
    let step = Command::Step(Step::SetTarget { partition: id, epoch: partition.epoch, nodes });
    assert!(matches!(changes_nothing(&mut state, step), Err(Refusal::StepOutdated { .. })));
}

#[test]
fn a_keyspace_can_be_dropped_in_the_middle_of_a_cut() {
    let (mut state, id) = whole();
    let child = cut(&mut state, id, b"m");
    state.apply(Command::DropKeyspace { name: "x".to_owned() }).expect("dropped");
    let done = Command::Divided { partition: id, child };
    assert_eq!(changes_nothing(&mut state, done), Err(Refusal::PartitionUnknown(id)));
}
