//! Ways in which people and programs change files.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::symlink,
};

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;

/// Longer than any wait of the watch; a busy machine is given more.
const SOON: Duration = Duration::from_secs(20);

/// Long enough for a change to be told that should not be.
const NEVER: Duration = Duration::from_millis(400);

struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn directory(&self, name: &str) {
        fs::create_dir_all(self.path(name)).unwrap();
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    fn link(&self, target: &str, name: &str) {
        symlink(target, self.path(name)).unwrap();
    }

    fn watch(&self, main: &str, directories: &[&str]) -> Watch {
        let directories: Vec<_> = directories.iter().map(|name| self.path(name)).collect();
        Watch::on(&Sources::new(Some(&self.path(main)), &directories)).unwrap()
    }
}

async fn tells(watch: &mut Watch) {
    let told = timeout(SOON, watch.changed()).await;
    told.expect("a change was not noticed").unwrap();
    silent(watch).await;
}

async fn silent(watch: &mut Watch) {
    let told = timeout(NEVER, watch.changed()).await;
    assert!(told.is_err(), "nothing changed, and yet: {told:?}");
}

#[tokio::test]
async fn a_file_that_is_written() {
    let place = Place::new();
    place.write("main.toml", "");
    let mut watch = place.watch("main.toml", &[]);
    silent(&mut watch).await;
    place.write("main.toml", "[default]\n");
    tells(&mut watch).await;
    // Appended to, without being truncated.
    let mut file = File::options()
        .append(true)
        .open(place.path("main.toml"))
        .unwrap();
    file.write_all(b"idle = '1s'\n").unwrap();
    silent(&mut watch).await;
    drop(file);
    tells(&mut watch).await;
}

#[tokio::test]
async fn a_truncated_file_is_not_told_before_it_is_closed() {
    let place = Place::new();
    place.write("main.toml", "[default]\n");
    let mut watch = place.watch("main.toml", &[]);
    let mut file = File::create(place.path("main.toml")).unwrap();
    silent(&mut watch).await;
    file.write_all(b"[default]\n").unwrap();
    silent(&mut watch).await;
    drop(file);
    tells(&mut watch).await;
}

#[tokio::test]
async fn nothing_is_told_while_a_file_is_being_written() {
    let place = Place::new();
    place.directory("d");
    place.write("main.toml", "[default]\n");
    let mut watch = place.watch("main.toml", &["d"]);
    // Another one changes just before, or meanwhile.
    place.write("d/a.toml", "");
    let mut file = File::create(place.path("main.toml")).unwrap();
    place.write("d/b.toml", "");
    silent(&mut watch).await;
    assert!(watch.has_news().unwrap());
    file.write_all(b"[default]\n").unwrap();
    silent(&mut watch).await;
    drop(file);
    tells(&mut watch).await;
    assert!(!watch.has_news().unwrap());

    // The writing begins after the change was told, and before it was read.
    place.write("d/a.toml", "");
    timeout(SOON, watch.changed()).await.unwrap().unwrap();
    let file = File::create(place.path("main.toml")).unwrap();
    assert!(watch.has_news().unwrap());
    silent(&mut watch).await;
    drop(file);
    tells(&mut watch).await;

    // It ends by another file in its place.
    let file = File::create(place.path("main.toml")).unwrap();
    place.write("new", "");
    place.rename("new", "main.toml");
    tells(&mut watch).await;
    drop(file);
}

#[tokio::test]
async fn what_is_read_anyway_need_not_be_told() {
    let place = Place::new();
    place.directory("d");
    let mut watch = place.watch("main.toml", &["d"]);
    place.write("main.toml", "");
    assert!(watch.has_news().unwrap());
    watch.renew().unwrap();
    assert!(!watch.has_news().unwrap());
    silent(&mut watch).await;
    place.link("/dev/null", "d/a.toml");
    watch.renew().unwrap();
    // As somebody does all the time.
    fs::write("/dev/null", "x").unwrap();
    silent(&mut watch).await;
    // A writing is not over for that.
    let file = File::create(place.path("main.toml")).unwrap();
    watch.renew().unwrap();
    place.write("d/b.toml", "");
    silent(&mut watch).await;
    drop(file);
    tells(&mut watch).await;
}

#[tokio::test]
async fn a_new_file_is_not_told_before_it_is_closed() {
    let place = Place::new();
    place.directory("d");
    let mut watch = place.watch("main.toml", &["d"]);
    for name in ["main.toml", "d/a.toml"] {
        let mut file = File::create_new(place.path(name)).unwrap();
        file.write_all(b"[default]\n").unwrap();
        silent(&mut watch).await;
        drop(file);
        tells(&mut watch).await;
    }
}

#[tokio::test]
async fn a_file_that_an_editor_replaces() {
    let place = Place::new();
    place.write("main.toml", "");
    let mut watch = place.watch("main.toml", &[]);
    // As `policy set` and most editors do.
    place.write("main.toml.new", "[default]\n");
    silent(&mut watch).await;
    place.rename("main.toml.new", "main.toml");
    tells(&mut watch).await;
    // As vim does with a backup.
    place.rename("main.toml", "main.toml~");
    place.write("main.toml", "[default]\n");
    fs::remove_file(place.path("main.toml~")).unwrap();
    tells(&mut watch).await;
    // And the new file is watched like the old one.
    place.write("main.toml", "");
    tells(&mut watch).await;
    // A second name for a file that is complete.
    fs::remove_file(place.path("main.toml")).unwrap();
    tells(&mut watch).await;
    place.write("other", "[default]\n");
    fs::hard_link(place.path("other"), place.path("main.toml")).unwrap();
    tells(&mut watch).await;
}

#[tokio::test]
async fn drop_ins_and_nothing_else_of_their_directory() {
    let place = Place::new();
    place.directory("d");
    let mut watch = place.watch("main.toml", &["d"]);
    for name in [
        "d/a.conf",
        "d/.a.toml",
        "d/a.toml~",
        "d/12.json",
        "other.toml",
    ] {
        place.write(name, "x");
        place.rename(name, "gone");
    }
    place.directory("d/sub");
    silent(&mut watch).await;
    place.write("d/a.toml", "");
    tells(&mut watch).await;
    place.link("/dev/null", "d/b.toml");
    tells(&mut watch).await;
    fs::remove_file(place.path("d/b.toml")).unwrap();
    tells(&mut watch).await;
    fs::remove_file(place.path("d/a.toml")).unwrap();
    tells(&mut watch).await;
}

#[tokio::test]
async fn a_config_map_that_kubernetes_swaps() {
    let place = Place::new();
    place.directory("d/..2024_1");
    for name in ["d/..2024_1/a.toml", "d/..2024_1/main.toml"] {
        place.write(name, "");
    }
    place.link("..2024_1", "d/..data");
    place.link("..data/a.toml", "d/a.toml");
    place.link("..data/main.toml", "d/main.toml");
    for (main, directories) in [("d/main.toml", &[][..]), ("none.toml", &["d"][..])] {
        let mut watch = place.watch(main, directories);
        for (old, new) in [("..2024_1", "..2024_2"), ("..2024_2", "..2024_1")] {
            place.directory(&format!("d/{new}"));
            for name in ["a.toml", "main.toml"] {
                place.write(&format!("d/{new}/{name}"), "");
            }
            place.link(new, "d/..data_tmp");
            silent(&mut watch).await;
            place.rename("d/..data_tmp", "d/..data");
            tells(&mut watch).await;
            fs::remove_dir_all(place.path(&format!("d/{old}"))).unwrap();
            silent(&mut watch).await;
        }
        // The way is followed anew: what is behind the link now is watched.
        place.write("d/..2024_1/a.toml", "[default]\n");
        place.write("d/..2024_1/main.toml", "[default]\n");
        tells(&mut watch).await;
    }
}

#[tokio::test]
async fn the_target_of_a_link_elsewhere() {
    let place = Place::new();
    for directory in ["d", "far/away", "far/other"] {
        place.directory(directory);
    }
    place.write("far/away/main.toml", "");
    place.write("far/away/a.toml", "");
    place.link("far/away/main.toml", "main.toml");
    place.link("../far/../far/away/a.toml", "d/a.toml");
    place.link("d", "link-to-d");
    let mut watch = place.watch("main.toml", &["link-to-d"]);
    place.write("far/away/main.toml", "[default]\n");
    tells(&mut watch).await;
    place.write("far/away/a.toml", "[default]\n");
    tells(&mut watch).await;
    place.write("far/away/nothing", "");
    place.write("far/nothing", "");
    silent(&mut watch).await;
    // A whole directory on the way is swapped.
    place.rename("far/away", "far/gone");
    tells(&mut watch).await;
    place.write("far/other/a.toml", "");
    place.rename("far/other", "far/away");
    tells(&mut watch).await;
    place.write("far/away/a.toml", "[default]\n");
    tells(&mut watch).await;
    // A link to another directory of drop-ins.
    place.directory("e");
    place.link("e", "new-link");
    place.rename("new-link", "link-to-d");
    tells(&mut watch).await;
    place.write("e/b.toml", "");
    tells(&mut watch).await;
    place.write("d/b.toml", "");
    silent(&mut watch).await;
}

#[tokio::test]
async fn a_directory_that_comes_later_and_goes() {
    let place = Place::new();
    let mut watch = place.watch("etc/main.toml", &["run/keepalive/conf.d"]);
    place.directory("run");
    tells(&mut watch).await;
    place.directory("run/keepalive");
    tells(&mut watch).await;
    // The agent keeps files of its own there.
    place.write("run/keepalive/1.new", "");
    place.rename("run/keepalive/1.new", "run/keepalive/1.json");
    place.write("run/keepalive/1.lock", "");
    silent(&mut watch).await;
    place.directory("run/keepalive/conf.d");
    tells(&mut watch).await;
    place.write("run/keepalive/1.new", "");
    place.rename("run/keepalive/1.new", "run/keepalive/1.json");
    silent(&mut watch).await;
    place.write("run/keepalive/conf.d/a.toml", "");
    tells(&mut watch).await;
    // Removed and made again, while somebody is in it.
    let inside = File::open(place.path("run/keepalive/conf.d")).unwrap();
    fs::remove_dir_all(place.path("run")).unwrap();
    tells(&mut watch).await;
    place.directory("run/keepalive/conf.d");
    tells(&mut watch).await;
    drop(inside);
    place.write("run/keepalive/conf.d/a.toml", "");
    timeout(SOON, watch.changed()).await.unwrap().unwrap();
    // And all of it in one go.
    place.directory("new/etc");
    place.write("new/etc/main.toml", "");
    silent(&mut watch).await;
    place.rename("new/etc", "etc");
    tells(&mut watch).await;
    place.write("etc/main.toml", "[default]\n");
    tells(&mut watch).await;
}

#[tokio::test]
async fn many_changes_are_one_and_the_last_one_counts() {
    let place = Place::new();
    place.directory("d");
    let mut watch = place.watch("main.toml", &["d"]);
    for index in 0..3000 {
        place.write(&format!("d/{index}.toml"), "");
    }
    tells(&mut watch).await;
}

#[tokio::test]
async fn somebody_who_never_stops_is_not_waited_for() {
    let place = Place::new();
    let mut watch = place.watch("main.toml", &[]);
    let writing = async {
        loop {
            place.write("main.toml", "");
            tokio::time::sleep(QUIET / 4).await;
        }
    };
    tokio::select! {
        () = writing => {}
        told = timeout(SOON, watch.changed()) => told.expect("never told").unwrap(),
    }
}

#[tokio::test]
async fn a_wait_that_is_given_up_loses_nothing() {
    let place = Place::new();
    let mut watch = place.watch("main.toml", &[]);
    place.write("main.toml", "");
    // Given up again and again, before the change is told.
    let end = Instant::now() + SOON;
    while timeout(QUIET / 10, watch.changed()).await.is_err() {
        assert!(Instant::now() < end, "a change was not noticed");
    }
    silent(&mut watch).await;
}

#[tokio::test]
async fn links_in_a_circle_and_files_in_the_way_are_watched_too() {
    let place = Place::new();
    place.link("b", "a");
    place.link("a", "b");
    place.write("file", "");
    let mut watch = place.watch("a", &["file/below"]);
    silent(&mut watch).await;
    place.write("new", "");
    place.rename("new", "a");
    tells(&mut watch).await;
    fs::remove_file(place.path("file")).unwrap();
    place.directory("file/below");
    tells(&mut watch).await;
}
