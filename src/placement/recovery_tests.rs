use super::*;
use crate::placement::{
    Command, Fit, Map, doctor,
    plan::tests::{arrive, cluster, create, liveness, settle},
    state::tests::changes_nothing,
};
use std::collections::BTreeSet;

/// Five nodes, and a keyspace of one partition with three replicas; the partition.
fn whole() -> (State, Partition) {
    let mut state = cluster(&["a"; 5]);
    let keyspace = create(&mut state, 3, 1);
    arrive(&mut state);
    settle(&mut state, &liveness(1..=5, &[]));
    let partition = state.map().partitions_of(keyspace).next().expect("one").clone();
    (state, partition)
}

fn held(replica: Replica, last_term: u64, last_index: u64) -> Account {
    let applied = last_index.saturating_sub(1);
    let held = Held { replica: replica.id, last_term, last_index, applied, term: 9, bounds: 1, confirmed: false };
    Account { held: Some(held), silence_ms: BTreeMap::new() }
}

fn asked(partition: &Partition, survivor: Replica) -> Recover {
    let (last_term, last_index) = (4, 17);
    let (epoch, survivor) = (partition.epoch, survivor.id);
    Recover { partition: partition.id, epoch, survivor, last_term, last_index, term: 9, wall_ms: 5_000 }
}

fn why(refused: Result<Choice, Refusal>) -> String {
    match refused {
        Err(Refusal::RecoverImpossible { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_longest_log_is_taken_or_the_one_asked_for() {
    let (_, mut partition) = whole();
    // Five members of which two are left: no quorum.
    let extra = [(101, 4), (102, 5)].map(|(id, node)| Replica { id: ReplicaId(id), node: NodeId(node + 10) });
    partition.members.extend(extra);
    let [one, two, ..] = partition.members[..] else { panic!("{partition:?}") };
    let accounts = |one_holds: (u64, u64), two_holds: (u64, u64)| {
        let holds = |replica: Replica, (term, index)| (replica.node, held(replica, term, index));
        BTreeMap::from([holds(one, one_holds), holds(two, two_holds)])
    };
    let chosen = |accounts, from| choose(&partition, &accounts, from).expect("two are left").survivor;
    assert_eq!(chosen(accounts((4, 17), (4, 18)), None), two);
    assert_eq!(chosen(accounts((5, 3), (4, 18)), None), one, "the later term counts more than the longer log");
    assert_eq!(chosen(accounts((5, 3), (4, 18)), Some(two.node)), two);
    let elsewhere = why(choose(&partition, &accounts((1, 1), (1, 1)), Some(NodeId(99))));
    assert!(elsewhere.contains("n99") && elsewhere.contains(&one.node.to_string()), "{elsewhere}");
    let mut late = accounts((1, 1), (1, 1));
    late.get_mut(&one.node).and_then(|account| account.held.as_mut()).expect("held").term = 40;
    assert_eq!(choose(&partition, &late, None).expect("left").term, 40, "of all that were asked");
}

#[test]
fn what_may_have_a_quorum_or_has_nothing_left_is_left_alone() {
    let (_, partition) = whole();
    let [one, two, three] = partition.members[..] else { panic!("{partition:?}") };
    let alone = BTreeMap::from([(one.node, held(one, 1, 1))]);
    assert!(choose(&partition, &alone, None).is_ok());
    let two_answer = BTreeMap::from([(one.node, held(one, 1, 1)), (two.node, Account::default())]);
    assert!(why(choose(&partition, &two_answer, None)).contains("2 of its 3 members"), "it may only be starting");
    for (silence, has_quorum) in [(Some(SILENT_AFTER_MS - 1), true), (Some(SILENT_AFTER_MS), false), (None, false)] {
        // Somebody else hears it, though whoever asks does not.
        let hears = Account { held: None, silence_ms: BTreeMap::from([(three.node, silence)]) };
        let mut accounts = alone.clone();
        accounts.insert(NodeId(77), hears);
        assert_eq!(choose(&partition, &accounts, None).is_err(), has_quorum, "{silence:?}");
    }
    let mut leads = alone.clone();
    leads.get_mut(&one.node).and_then(|account| account.held.as_mut()).expect("held").confirmed = true;
    assert!(choose(&partition, &leads, None).is_err(), "a quorum has just confirmed it");
    assert!(why(choose(&partition, &BTreeMap::new(), None)).contains("with its data directory"));
    let other = Replica { id: ReplicaId(99), ..one };
    let incarnation = BTreeMap::from([(one.node, held(other, 1, 1))]);
    assert!(choose(&partition, &incarnation, None).is_err(), "not a replica of this partition any more");
}

#[test]
fn what_is_being_cut_or_merged_is_not_recovered_nor_is_the_driver() {
    let (mut state, partition) = whole();
    let one = partition.members[0];
    let alone = BTreeMap::from([(one.node, held(one, 1, 1))]);
    let driver = state.map().driver().expect("there").clone();
    let recover = Command::Recover(asked(&driver, driver.members[0]));
    assert!(matches!(changes_nothing(&mut state, recover), Err(Refusal::RecoverImpossible { .. })));
    assert!(why(choose(&driver, &alone, None)).contains("placement driver"));
    let at = Bytes::from_static(&[0, 0, 0, 0, 0, 0, 0, 9]);
    let cut = Command::Divide { partition: partition.id, bounds: partition.epoch.bounds, at };
    state.apply(cut).expect("at rest");
    let cut = state.map().partition(partition.id).expect("there").clone();
    assert!(why(choose(&cut, &alone, None)).contains("cut in two"));
    let recover = Command::Recover(asked(&cut, one));
    assert!(matches!(changes_nothing(&mut state, recover), Err(Refusal::RecoverImpossible { .. })));
}

#[test]
fn one_replica_stays_and_the_others_are_given_up_for_good() {
    let (mut state, before) = whole();
    let (id, survivor) = (before.id, before.members[1]);
    let recover = asked(&before, survivor);
    let Ok(Reply::Recovering { replica }) = state.apply(Command::Recover(recover.clone())) else { panic!("refused") };
    assert_eq!(state.map().check(), Ok(()));
    let fresh = Replica { id: replica, node: survivor.node };
    let now = state.map().partition(id).expect("there").clone();
    assert_eq!(now.replicas().collect::<Vec<_>>(), [fresh]);
    assert!(before.replicas().all(|old| old.id != fresh.id));
    assert_eq!(now.phase, Phase::Recovering(survivor.id, 9 + TERM_GAP));
    assert_eq!(now.epoch, Epoch { members: 17 + INDEX_GAP, ..before.epoch });
    assert!(!now.is_at_rest(), "it is not built up before it has begun");
    let again = changes_nothing(&mut state, Command::Recover(recover.clone()));
    assert_eq!(again, Ok(Reply::Recovering { replica }), "an attempt without an answer is repeated");
    let stale = Recover { wall_ms: 6_000, ..recover };
    assert!(matches!(changes_nothing(&mut state, Command::Recover(stale)), Err(Refusal::StepOutdated { .. })));

    // What is left of the old group elects a leader, which reports its members.
    let old = Command::Report { partition: id, members_epoch: 900, members: before.members.clone() };
    assert_eq!(changes_nothing(&mut state, old.clone()), Ok(Reply::Reported { changed: false }));
    let begun = Command::Report { partition: id, members_epoch: now.epoch.members, members: vec![fresh] };
    assert_eq!(state.apply(begun.clone()), Ok(Reply::Reported { changed: true }));
    assert_eq!(changes_nothing(&mut state, begun), Ok(Reply::Reported { changed: false }));
    assert_eq!(changes_nothing(&mut state, old), Ok(Reply::Reported { changed: false }));
    settle(&mut state, &liveness(1..=5, &[]));
    let healed = state.map().partition(id).expect("there");
    assert_eq!((healed.phase, healed.members.len()), (Phase::Active, 3));
    assert!(healed.replicas().all(|replica| before.members.iter().all(|old| old.id != replica.id)));
}

#[test]
fn what_was_done_is_kept_with_the_state() {
    let (mut state, before) = whole();
    let (id, survivor) = (before.id, before.members[0]);
    let whole = state.encode();
    assert_eq!(State::decode(&whole).expect("sound").encode(), whole, "without any the bytes are as they were");
    assert_eq!(state.recoveries_of(id), []);
    state.apply(Command::Recover(asked(&before, survivor))).expect("no quorum");
    let kept = State::decode(&state.encode()).expect("sound");
    assert_eq!(kept.encode(), state.encode());
    let [entry] = &kept.recoveries_of(id)[..] else { panic!("one") };
    assert_eq!((entry.wall_ms, entry.partition, entry.times), (5_000, id, 1));
    assert!(entry.what.contains(&format!("from {} on {} alone", survivor.id, survivor.node)), "{entry:?}");
    for lost in &before.members[1..] {
        assert!(entry.why.contains(&format!("{} on {}", lost.id, lost.node)), "{entry:?}");
    }
    assert!(entry.result.contains("up to 17 of term 4"), "{entry:?}");
    assert_eq!(kept.recoveries_of(DRIVER), []);
    let mut map = Map::default();
    assert_eq!(map.apply(state.map().full()), Fit::Applied);
    let alive: BTreeSet<NodeId> = [survivor.node].into();
    let now = map.partition(id).expect("there");
    assert_eq!(doctor::state_of(&map, now, &alive, None), "recovering");
}

#[test]
fn what_a_node_knows_comes_back() {
    let (_, partition) = whole();
    let mut account = held(partition.members[0], 3, 300);
    account.silence_ms = BTreeMap::from([(NodeId(2), Some(300)), (NodeId(3), None)]);
    assert_eq!(Account::decode(&account.encode()), Ok(account.clone()));
    let accounts = BTreeMap::from([(NodeId(1), account)]);
    let silences = [1, 2, 3, 4].map(|node| silence_ms(&accounts, NodeId(node)));
    assert_eq!(silences, [Some(0), Some(300), None, None]);
}
