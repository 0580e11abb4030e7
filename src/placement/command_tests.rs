use super::super::hex;
use super::*;
use crate::key::{KeyspaceId, PartitionId};

fn process() -> RegisterNode {
    RegisterNode {
        cluster_id: "c1".to_owned(),
        uuid: "u".to_owned(),
        address: "h:1".to_owned(),
        zone: "z".to_owned(),
        weight_milli: 1_500,
        previous: Some(NodeId(300)),
        ephemeral: true,
    }
}

fn commands() -> Vec<Command> {
    let partition = PartitionId(7);
    let create = CreateKeyspace {
        name: "ks".to_owned(),
        kind: KeyKind::Integer { max: 1_000 },
        layout: Layout::Hashed,
        replicas: 3,
        cuts: Cuts::Even(8),
        avoid: BTreeSet::from([NodeId(2)]),
    };
    let cut = CreateKeyspace {
        kind: KeyKind::Bytes,
        layout: Layout::Ordered,
        cuts: Cuts::At(vec![Bytes::from_static(b"m")]),
        ..create.clone()
    };
    let target =
        Step::SetTarget { partition, epoch: Epoch { bounds: 1, members: 2 }, nodes: vec![NodeId(4), NodeId(5)] };
    let members = vec![Replica { id: ReplicaId(8), node: NodeId(4) }];
    vec![
        Command::Bootstrap { cluster_id: "c1".to_owned(), node: process(), replicas_default: 3 },
        Command::RegisterNode(process()),
        Command::CreateKeyspace(create),
        Command::CreateKeyspace(cut),
        Command::DropKeyspace { name: "ks".to_owned() },
        Command::Report { partition, members_epoch: 9, members },
        Command::Step(target),
        Command::Step(Step::SetInitializer { partition, from: ReplicaId(8), to: ReplicaId(9) }),
        Command::SetStanding { node: NodeId(4), standing: Standing::Leaving },
        Command::Divide { partition: PartitionId(3), bounds: 2, at: Bytes::from_static(b"m") },
        Command::Divided { partition: PartitionId(3), child: PartitionId(9) },
        Command::Merge { pair: [PartitionId(3), PartitionId(9)], bounds: [2, 1] },
        Command::Unmerge { pair: [PartitionId(3), PartitionId(9)] },
        Command::Merged { pair: [PartitionId(3), PartitionId(9)], bounds: 3 },
        Command::Unmerged { pair: [PartitionId(3), PartitionId(9)], bounds: 3 },
        Command::Recover(Recover {
            partition,
            epoch: Epoch { bounds: 1, members: 2 },
            survivor: ReplicaId(8),
            last_term: 4,
            last_index: 300,
            term: 5,
            wall_ms: 6,
        }),
    ]
}

#[test]
fn command_bytes_are_golden_and_come_back() {
    let golden = [
        "0300026331026331017503683a31017adc0b01ac020103",
        "0301026331017503683a31017adc0b01ac0201",
        "0302026b7301e807010300080102",
        "0302026b730000030101016d0102",
        "0303026b73",
        "03040709010804",
        "030500070102020405",
        "030501070809",
        "03060403",
        "03070302016d",
        "03080309",
        "030903090201",
        "030a0309",
        "030b030903",
        "030c030903",
        "030d0701020804ac020506",
    ];
    let bytes: Vec<Bytes> = commands().iter().map(Command::encode).collect();
    assert_eq!(bytes.iter().map(|bytes| hex(bytes)).collect::<Vec<_>>(), golden);
    for (bytes, command) in bytes.iter().zip(commands()) {
        assert_eq!(Command::decode(bytes), Ok(command));
    }
}

fn refusals() -> Vec<(Refusal, Reason)> {
    let partition = PartitionId(7);
    let why = || "why".to_owned();
    vec![
        (Refusal::NotInitialized, Reason::NotInitialized),
        (Refusal::ClusterMismatch { ours: why(), theirs: why() }, Reason::ClusterMismatch),
        (Refusal::IdentityMismatch { uuid: why(), claimed: NodeId(1), known: why() }, Reason::IdentityMismatch),
        (Refusal::AddressTaken { address: why(), node: NodeId(5) }, Reason::IdentityMismatch),
        (Refusal::FieldInvalid { field: Field::SplitAt, why: why() }, Reason::InvalidField),
        (Refusal::NameInvalid(why()), Reason::NameInvalid),
        (Refusal::KeyspaceExists { name: why(), differs: why() }, Reason::KeyspaceExists),
        (Refusal::LimitReached { what: why(), limit: 5 }, Reason::Overloaded),
        (Refusal::PartitionUnknown(partition), Reason::WrongPartition),
        (Refusal::ReportInvalid { partition, why: why() }, Reason::Internal),
        (Refusal::StepOutdated { partition, why: why() }, Reason::WrongPartition),
        (Refusal::NodeUnknown(NodeId(5)), Reason::NodeUnknown),
        (Refusal::NodeRemoved(NodeId(5)), Reason::NodeRemoved),
        (
            Refusal::StandingRefused { node: NodeId(5), now: Standing::Active, asked: Standing::Leaving, why: why() },
            Reason::NodeNeeded,
        ),
        (Refusal::NoNodeForReplicas, Reason::NodeNeeded),
        (Refusal::CutImpossible { partition, at: why(), why: why() }, Reason::InvalidField),
        (Refusal::MergeImpossible { left: partition, right: PartitionId(8), why: why() }, Reason::InvalidField),
        (Refusal::RecoverImpossible { partition, why: why() }, Reason::InvalidField),
    ]
}

#[test]
fn answer_bytes_are_golden_and_come_back() {
    let keyspace = Keyspace {
        id: KeyspaceId(2),
        name: "ks".to_owned(),
        kind: KeyKind::Bytes,
        layout: Layout::Ordered,
        replicas: 3,
    };
    let warnings = vec!["w".to_owned()];
    let replies = [
        Reply::Bootstrapped { cluster_id: "c".to_owned(), created: true },
        Reply::Registered { node: NodeId(5), created: false },
        Reply::KeyspaceCreated { keyspace, partitions: 8, created: true, warnings },
        Reply::KeyspaceDropped { dropped: true },
        Reply::Reported { changed: true },
        Reply::Stepped,
        Reply::StandingSet { standing: Standing::Draining, changed: true },
        Reply::Dividing { child: PartitionId(9) },
        Reply::Merging { since: 300 },
        Reply::Recovering { replica: ReplicaId(8) },
    ];
    let answers: Vec<Answer> =
        replies.into_iter().map(Ok).chain(refusals().into_iter().map(|(refusal, _)| Err(refusal))).collect();
    let golden = [
        "030000016301",
        "0300010500",
        "03000202026b730000030801010177",
        "03000301",
        "03000401",
        "030005",
        "0300060201",
        "03000709",
        "030008ac02",
        "03000908",
        "030100",
        "0301010377687903776879",
        "030102037768790103776879",
        "0301030377687905",
        "0301040803776879",
        "03010503776879",
        "0301060377687903776879",
        "0301070377687905",
        "03010807",
        "0301090703776879",
        "03010a0703776879",
        "03010b05",
        "03010c05",
        "03010d05000303776879",
        "03010e",
        "03010f070377687903776879",
        "030110070803776879",
        "0301110703776879",
    ];
    let bytes: Vec<Bytes> = answers.iter().map(encode_answer).collect();
    assert_eq!(bytes.iter().map(|bytes| hex(bytes)).collect::<Vec<_>>(), golden);
    for (bytes, answer) in bytes.iter().zip(answers) {
        assert_eq!(decode_answer(bytes), Ok(answer));
    }
}

#[test]
fn refusals_become_errors_that_did_not_happen() {
    for (refusal, reason) in refusals() {
        let error = Error::from(refusal.clone());
        assert_eq!((error.reason, error.outcome), (reason, Some(Outcome::NotApplied)), "{refusal:?}");
        assert_eq!(error.message, refusal.to_string());
    }
    let error = Error::from(Refusal::FieldInvalid { field: Field::SplitAt, why: "why".to_owned() });
    assert_eq!(error.field, "split_at");
    assert!(Error::from(Refusal::LimitReached { what: "nodes".to_owned(), limit: 1 }).retry_after_ms == 0);
}
