//! How much memory this process may use: the machine's, or what its control group allows it. Read once, at start.

use std::{fs, path::Path};

/// The memory of the machine whose files lie under `root`; none if nothing is known of it.
pub(super) fn machine_bytes(root: &Path) -> Option<u64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let total = read("proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    // "max" in version 2 and a huge number in version 1 are no limits.
    let limit = |path: &str| read(path).and_then(|text| text.trim().parse::<u64>().ok());
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let above = Path::new(own).ancestors().map(|group| format!("sys/fs/cgroup/{}/memory.max", group.display()));
    let limits = above.chain(["sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned()]).filter_map(|path| limit(&path));
    limits.chain(total).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_the_machine_and_its_control_groups_counts() {
        let root = tempfile::TempDir::new().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(machine_bytes(root.path()), None);
        write("proc/meminfo", "MemTotal:        2048 kB\nMemFree:         1 kB\n");
        assert_eq!(machine_bytes(root.path()), Some(2048 * 1024));
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("proc/self/cgroup", "0::/system.slice/meridian.service\n");
        write("sys/fs/cgroup/system.slice/meridian.service/memory.max", "max\n");
        assert_eq!(machine_bytes(root.path()), Some(2048 * 1024));
        write("sys/fs/cgroup/system.slice/memory.max", "1000000\n");
        assert_eq!(machine_bytes(root.path()), Some(1_000_000));
    }
}
