use crate::{
    key::{DRIVER, KeyKind, Layout, PartitionId, Span},
    placement::{
        Command, CreateKeyspace, Cuts, Duty, Refusal, Reply, State, Step,
        plan::tests::arrive,
        state::tests::{changes_nothing, cluster},
    },
};
use bytes::Bytes;
use std::collections::BTreeSet;

/// A state with a keyspace of three partitions on three nodes, at rest.
fn three() -> (State, [PartitionId; 3]) {
    let mut state = cluster(3);
    let create = CreateKeyspace {
        name: "x".to_owned(),
        kind: KeyKind::Bytes,
        layout: Layout::Ordered,
        replicas: 3,
        cuts: Cuts::At(vec![Bytes::from_static(b"g"), Bytes::from_static(b"n")]),
        avoid: BTreeSet::new(),
    };
    state.apply(Command::CreateKeyspace(create)).expect("new");
    let keyspace = state.map().keyspace_by_name("x").expect("made").id;
    let ids: Vec<PartitionId> = state.map().partitions_of(keyspace).map(|partition| partition.id).collect();
    arrive(&mut state);
    (state, ids.try_into().expect("three"))
}

fn merge(pair: [PartitionId; 2]) -> Command {
    Command::Merge { pair, bounds: [1, 1] }
}

fn duties(state: &State, ids: [PartitionId; 3]) -> [Option<Duty>; 3] {
    ids.map(|id| state.map().partition(id).expect("there").merge.as_ref().map(|merge| merge.duty))
}

const HEARD: Result<Reply, Refusal> = Ok(Reply::Reported { changed: true });
const OLD: Result<Reply, Refusal> = Ok(Reply::Reported { changed: false });

#[test]
fn two_neighbours_are_marked_and_then_become_one() {
    let (mut state, ids @ [left, right, last]) = three();
    let pair = [left, right];
    let since = state.map().version() + 1;
    assert_eq!(state.apply(merge(pair)), Ok(Reply::Merging { since }));
    assert_eq!(state.map().check(), Ok(()));
    assert_eq!(duties(&state, ids), [Some(Duty::Absorb), Some(Duty::Yield), None]);
    assert!(pair.iter().all(|id| !state.map().partition(*id).expect("there").is_at_rest()));
    assert_eq!(changes_nothing(&mut state, merge(pair)), Ok(Reply::Merging { since }), "asked twice, done once");
    let overlapping = Command::Merge { pair: [right, last], bounds: [1, 1] };
    assert!(matches!(changes_nothing(&mut state, overlapping), Err(Refusal::StepOutdated { .. })));
    let early = Command::Unmerged { pair, bounds: 2 };
    assert_eq!(changes_nothing(&mut state, early), OLD, "nobody asked for a fence");
    assert_eq!(State::decode(&state.encode()).expect("sound").encode(), state.encode());

    let before = state.map().partition(left).expect("there").clone();
    for bounds in [1, 3] {
        assert_eq!(changes_nothing(&mut state, Command::Merged { pair, bounds }), OLD, "of another time");
    }
    let done = Command::Merged { pair, bounds: 2 };
    assert_eq!(state.apply(done.clone()), HEARD);
    let whole = state.map().partition(left).expect("there");
    assert_eq!(whole.span, Span::new(Bytes::new(), Some(Bytes::from_static(b"n"))));
    assert_eq!((whole.epoch.bounds, &whole.members, &whole.birth), (2, &before.members, &before.birth));
    assert!(whole.is_at_rest() && state.map().partition(right).is_none());
    assert_eq!(state.map().check(), Ok(()));
    assert_eq!(changes_nothing(&mut state, done), OLD, "told twice");
    let delta = state.delta_since(since).expect("known");
    assert_eq!((delta.partitions.len(), delta.partitions_removed), (1, vec![right]));
    let next = Command::Merge { pair: [left, last], bounds: [2, 1] };
    assert!(matches!(state.apply(next), Ok(Reply::Merging { .. })));
}

#[test]
fn a_withdrawn_merge_ends_with_what_the_log_decides() {
    for absorbed in [false, true] {
        let (mut state, ids @ [left, right, _]) = three();
        let pair = [left, right];
        assert_eq!(changes_nothing(&mut state, Command::Unmerge { pair }), OLD, "nothing to withdraw");
        state.apply(merge(pair)).expect("neighbours");
        assert_eq!(state.apply(Command::Unmerge { pair }), HEARD);
        assert_eq!(state.map().check(), Ok(()));
        assert_eq!(duties(&state, ids), [Some(Duty::Fence), Some(Duty::Yield), None]);
        assert_eq!(changes_nothing(&mut state, Command::Unmerge { pair }), OLD);
        assert!(matches!(changes_nothing(&mut state, merge(pair)), Err(Refusal::StepOutdated { .. })));
        if absorbed {
            assert_eq!(state.apply(Command::Merged { pair, bounds: 2 }), HEARD, "it was decided before the fence");
            assert!(state.map().partition(right).is_none());
        } else {
            assert_eq!(state.apply(Command::Unmerged { pair, bounds: 2 }), HEARD);
            assert_eq!(duties(&state, ids), [None; 3]);
            assert!(pair.iter().all(|id| state.map().partition(*id).expect("there").is_at_rest()));
            // Of the next one, nothing that belongs to this one is believed.
            let again = Command::Merge { pair, bounds: [2, 1] };
            assert!(matches!(state.apply(again), Ok(Reply::Merging { .. })));
            for late in [Command::Merged { pair, bounds: 2 }, Command::Unmerged { pair, bounds: 2 }] {
                assert_eq!(changes_nothing(&mut state, late), OLD);
            }
        }
        assert_eq!(state.map().check(), Ok(()));
    }
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let (mut state, [left, right, last]) = three();
    let default = state.map().keyspace_by_name("default").expect("it always exists").id;
    let elsewhere = state.map().partitions_of(default).next().expect("one").id;
    for pair in [[left, last], [right, left], [left, left], [DRIVER, left], [last, DRIVER], [last, elsewhere]] {
        let refused = changes_nothing(&mut state, merge(pair));
        assert!(matches!(refused, Err(Refusal::MergeImpossible { .. })), "{pair:?}: {refused:?}");
    }
    let unknown = [left, PartitionId(99)];
    assert_eq!(changes_nothing(&mut state, merge(unknown)), Err(Refusal::PartitionUnknown(PartitionId(99))));
    for bounds in [[2, 1], [1, 2]] {
        let late = Command::Merge { pair: [left, right], bounds };
        assert!(matches!(changes_nothing(&mut state, late), Err(Refusal::StepOutdated { .. })));
    }
    state.apply(Command::Divide { partition: right, bounds: 1, at: Bytes::from_static(b"k") }).expect("at rest");
    let refused = changes_nothing(&mut state, merge([left, right]));
    assert!(matches!(refused, Err(Refusal::StepOutdated { partition, .. }) if partition == right));
}

#[test]
fn members_and_bounds_stay_while_partitions_are_merged() {
    let (mut state, [left, right, _]) = three();
    state.apply(merge([left, right])).expect("neighbours");
    for (partition, at) in [(left, &b"c"[..]), (right, b"k")] {
        let known = state.map().partition(partition).expect("there");
        let nodes = known.members.iter().take(2).map(|replica| replica.node).collect();
        let step = Command::Step(Step::SetTarget { partition, epoch: known.epoch, nodes });
        assert!(matches!(changes_nothing(&mut state, step), Err(Refusal::StepOutdated { .. })));
        let cut = Command::Divide { partition, bounds: 1, at: Bytes::copy_from_slice(at) };
        assert!(matches!(changes_nothing(&mut state, cut), Err(Refusal::StepOutdated { .. })));
    }
}

#[test]
fn a_keyspace_can_be_dropped_in_the_middle_of_a_merge() {
    let (mut state, [left, right, _]) = three();
    state.apply(merge([left, right])).expect("neighbours");
    state.apply(Command::DropKeyspace { name: "x".to_owned() }).expect("dropped");
    let done = Command::Merged { pair: [left, right], bounds: 2 };
    assert_eq!(changes_nothing(&mut state, done), Err(Refusal::PartitionUnknown(left)));
}
