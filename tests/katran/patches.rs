//! katran-patches/apply, on a source tree that has what matters of Katran's, in our words.

use std::path::{Path, PathBuf};
use std::process::Command;

const BALANCER: &str = "katran/lib/bpf/balancer.bpf.c";
const HEADER: &str = "katran/lib/bpf/inner_dst.h";
const CONSTS: &str = "katran/lib/bpf/balancer_consts.h";
const INCLUDE: &str =
    "#ifdef INNER_DST\n#include \"katran/lib/bpf/inner_dst.h\"\n#endif // INNER_DST\n";
const CALL: &str = "#ifdef INNER_DST\n  if (!inner_dst_restore(\n          data + nh_off, data_end, \
                    is_ipv6, &pckt, &vip, vip_info)) {\n    return XDP_DROP;\n  }\n#endif // INNER_DST\n";
const FLAGS: &str = "// vip_meta flags\n#define F_HASH_NO_SRC_PORT (1 << 0)\n// another\n\
                     #define F_LAST (1 << 9)\n// packet_description flags:\n#define F_ICMP (1 << 0)\n";
const FLAG: &str = "// vip has an inner destination, which goes back into its packets\n\
                    #define F_INNER_DST (1 << 30)\n";

const LIBRARY: &str = "katran/lib/KatranLb.cpp";
const TESTER: &str = "katran/lib/testing/framework/katran_tester.cpp";
const FIXTURES: &str = "katran/lib/testing/fixtures/KatranInnerDstTestFixtures.h";

/// A program with the same names in the same order, and some traps around them.
const SOURCE: &str = r#"/* process_packet() { PCKT_DATA_LEN } */
#include <stddef.h>
#include "katran/lib/bpf/balancer_consts.h"
#include "katran/lib/bpf/handle_icmp.h"
#include "katran/lib/bpf/pckt_encap.h"

static int other(struct xdp_md* xdp) {
  // { an unbalanced brace in a comment, and PCKT_DATA_LEN
  const char* text = "} process_packet(";
  return PCKT_DATA_LEN(xdp) > MAX_PCKT_SIZE;
}

static int process_packet(struct xdp_md* xdp, __u64 nh_off, bool is_ipv6) {
  void *data = 0, *data_end = 0;
  struct packet_description pckt = {};
  struct vip_definition vip = {};
  struct vip_meta* vip_info = bpf_map_lookup_elem(&vip_map, &vip);
  if (!vip_info) {
#ifdef CIDR_VIP
    vip_info = other(xdp);
#endif
    vip_info = bpf_map_lookup_elem(&vip_map, &vip);
  }

  __u64 length = PCKT_DATA_LEN(xdp);
  if (length > MAX_PCKT_SIZE) {
    return XDP_DROP;
  }
  return XDP_TX;
}
"#;

/// The server's side, with two things that are like what is looked for.
const LOADS: &str = "namespace katran {\n\nbool KatranLb::reload() {\n  reloadBpfFromFile(config_.balancerProgPath);\n  \
                     // createNamedBpfMap\n  use(config_.rootMapPath, standalone_, isMapInBpfObject, \
                     getPinnedBpfObject, createNamedBpfMap, kMapNoFlags);\n}\n\n\
                     void KatranLb::loadBpfProgs() {\n  int res;\n  // loadBpfProg(config_.balancerProgPath);\n  \
                     res = bpfAdapter_->loadBpfProg(config_.balancerProgPath);\n  if (res) {\n    \
                     throw std::invalid_argument(\"} no\");\n  }\n\n  attach();\n}\n\n} // namespace katran\n";

struct Tree(tempfile::TempDir);

impl Tree {
    fn new(source: &str) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir_all(tree.path("katran/lib/bpf")).unwrap();
        tree.write(BALANCER, source);
        tree.write(CONSTS, FLAGS);
        tree.write(LIBRARY, LOADS);
        tree
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// What it says, or what it refuses with.
    fn apply(&self, options: &[&str]) -> Result<String, String> {
        apply(self.0.path(), options)
    }

    /// Applies a patch as anybody would.
    fn git_apply(&self, patch: &str) {
        std::fs::write(self.path("patch"), patch).unwrap();
        let output = Command::new("git")
            .args(["apply", "patch"])
            .env("GIT_CEILING_DIRECTORIES", self.0.path().parent().unwrap())
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn apply(tree: &Path, options: &[&str]) -> Result<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("katran-patches/apply");
    let output = Command::new(script).args(options).arg(tree).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[test]
fn the_lines_go_where_their_surroundings_say_and_come_out_again() {
    let tree = Tree::new(SOURCE);
    assert!(tree.apply(&["--check"]).unwrap_err().contains("not applied"));
    let said = tree.apply(&[]).unwrap();
    assert!(said.contains("applied (another Katran, places found by name)"), "{said}");

    // An ordinary patch, with context, gives the same.
    let files = [BALANCER, CONSTS, LIBRARY, HEADER];
    let patched = files.map(|file| tree.read(file));
    let diff = tree.apply(&["--diff"]).unwrap();
    assert!(diff.lines().any(|line| line.starts_with(' ')), "{diff}");
    tree.apply(&["--revert"]).unwrap();
    assert_eq!(tree.apply(&["--diff"]).unwrap(), diff, "applied or not");
    tree.git_apply(&diff);
    assert_eq!(files.map(|file| tree.read(file)), patched);

    let judged = "  __u64 length = PCKT_DATA_LEN(xdp);\n";
    let expected = SOURCE
        .replace(
            "#include \"katran/lib/bpf/pckt",
            &format!("{INCLUDE}#include \"katran/lib/bpf/pckt"),
        )
        .replace(judged, &format!("{CALL}{judged}"));
    assert_eq!(tree.read(BALANCER), expected);
    assert!(tree.read(HEADER).contains("inner_dst_restore("));
    let flag = FLAGS.replace("(1 << 9)\n", &format!("(1 << 9)\n{FLAG}"));
    assert_eq!(tree.read(CONSTS), flag);
    // The map is shared before the program is loaded.
    let library = tree.read(LIBRARY);
    let order = [
        "int res",
        "updateSharedMap(innerDst",
        "loadBpfProg(config_.balancerProgPath);\n  if",
        "attach()",
    ];
    let places: Vec<_> = order.iter().map(|text| library.find(text).unwrap()).collect();
    assert!(places.is_sorted(), "{library}");

    assert!(tree.apply(&[]).unwrap().contains("applied already, and right"));
    assert!(tree.apply(&["--check"]).unwrap().contains("applied, and right"));
    assert!(tree.apply(&["--revert"]).unwrap().contains("taken out"));
    assert_eq!(tree.read(BALANCER), SOURCE);
    assert_eq!(tree.read(CONSTS), FLAGS);
    assert_eq!(tree.read(LIBRARY), LOADS);
    assert!(!tree.path(HEADER).exists());
    assert!(tree.apply(&["--revert"]).unwrap().contains("nothing to take out"));
}

#[test]
fn where_the_surroundings_are_not_there_nothing_is_changed() {
    let size = "  __u64 length = PCKT_DATA_LEN(xdp);\n";
    let lookup = "    vip_info = bpf_map_lookup_elem(&vip_map, &vip);\n";
    let cases = [
        (
            SOURCE.replace("process_packet(struct", "handle_packet(struct"),
            "not exactly one function",
        ),
        (SOURCE.replace("&vip_map", "&vips"), "does not look into vip_map"),
        (
            SOURCE.replace("PCKT_DATA_LEN", "LENGTH").replace("MAX_PCKT_SIZE", "2000"),
            "does not judge",
        ),
        (
            SOURCE.replace(lookup, "").replace(size, &format!("{size}{lookup}")),
            "before the VIP is known",
        ),
        (SOURCE.replace(size, &format!("#ifdef X\n{size}#endif\n")), "in a branch only"),
        (
            SOURCE.replace(size, "  if (vip_info) {\n  __u64 length = PCKT_DATA_LEN(xdp);\n  }\n"),
            "in a branch only",
        ),
        (
            SOURCE.replace(size, &format!("  if (nh_off &&\n#ifdef X\n      1 &&\n#endif\n{size}")),
            "in the middle",
        ),
        (SOURCE.replace("nh_off", "offset"), "has no nh_off"),
        (SOURCE.replace("length = PCKT", "length =\n      PCKT"), "in the middle of a statement"),
        (SOURCE.replace("katran/lib/bpf/", ""), "to put our include behind"),
        // A goto would jump past the call.
        (SOURCE.replace(size, &format!("judge:{size}")), "past our call"),
        (SOURCE.replace(size, &format!("  judge : {}", size.trim_start())), "past our call"),
        // The call would come before the header.
        (
            SOURCE.replace("#include \"katran/lib/bpf/", "#include \"katran/lib/linux/")
                + "#include \"katran/lib/bpf/handle_icmp.h\"\n",
            "behind a function",
        ),
    ];
    for (source, why) in cases {
        let tree = Tree::new(&source);
        let refusal = tree.apply(&[]).unwrap_err();
        assert!(refusal.contains(why), "{why:?} expected: {refusal}");
        assert_eq!(refusal.lines().count(), 1, "{refusal}");
        assert_eq!(tree.read(BALANCER), source);
        assert!(!tree.path(HEADER).exists());
    }
    let load = "  res = bpfAdapter_->loadBpfProg(config_.balancerProgPath);\n";
    let cases = [
        (LOADS.replace("::loadBpfProgs", "::start"), "not loaded in loadBpfProgs()"),
        (
            LOADS.replace("int res;", "int res;\n}\n\nbool KatranLb::other() {"),
            "not loaded in loadBpfProgs()",
        ),
        (LOADS.replace(load, &load.repeat(2)), "in exactly one place"),
        (LOADS.replace(load, ""), "in exactly one place"),
        (LOADS.replace(load, &format!("#ifdef X\n{load}#endif\n")), "in a branch only"),
        (LOADS.replace(load, &format!("  if (res)\n{load}")), "in the middle of a statement"),
        (LOADS.replace(load, &format!("  if (res) {{\n{load}  }}\n")), "in a branch only"),
        (LOADS.replace("standalone_, ", ""), "there is no standalone_"),
    ];
    for (library, why) in cases {
        let tree = Tree::new(SOURCE);
        tree.write(LIBRARY, &library);
        let refusal = tree.apply(&[]).unwrap_err();
        assert!(refusal.contains(why), "{why:?} expected: {refusal}");
        assert_eq!((tree.read(BALANCER), tree.read(LIBRARY)), (SOURCE.to_owned(), library));
    }
}

#[test]
fn what_was_moved_or_changed_afterwards_is_noticed() {
    let (patched, library) = {
        let tree = Tree::new(SOURCE);
        tree.apply(&[]).unwrap();
        (tree.read(BALANCER), tree.read(LIBRARY))
    };
    // Into the wrong function; only the include; a changed header; a flag that is taken.
    let moved = patched.replace(CALL, "").replace("  return PCKT", &format!("{CALL}  return PCKT"));
    let tree = Tree::new(&moved);
    assert!(tree.apply(&["--check"]).unwrap_err().contains("our lines are missing here alone"));
    let flags = FLAGS.replace("(1 << 9)\n", &format!("(1 << 9)\n{FLAG}"));
    tree.write(CONSTS, &flags);
    tree.write(LIBRARY, &library);
    assert!(tree.apply(&["--check"]).unwrap_err().contains("not where they belong"));
    assert!(tree.apply(&[]).unwrap_err().contains("not where they belong"));
    tree.apply(&["--revert"]).unwrap();
    assert_eq!(tree.read(BALANCER), SOURCE);
    tree.apply(&[]).unwrap();
    assert_eq!(tree.read(BALANCER), patched);

    tree.write(HEADER, "/* another */\n");
    for option in [&["--check"][..], &["--revert"]] {
        assert!(tree.apply(option).unwrap_err().contains("is not ours, or was changed"));
    }
    assert_eq!(tree.read(HEADER), "/* another */\n");
    std::fs::remove_file(tree.path(HEADER)).unwrap();
    assert!(tree.apply(&["--check"]).unwrap_err().contains("is missing"));

    let tree = Tree::new(&patched.replace(CALL, ""));
    assert!(tree.apply(&[]).unwrap_err().contains("only some of our lines are there"));

    for flag in [
        "(1 << 30)",
        "(1u<<30)",
        "(1UL << 0x1e)",
        "0x40000000",
        "BIT(30)",
        "BIT_ULL(30)",
        "1073741824",
        "1073741824U",
        "((__u32)1 << 30)",
        "(1 << \\\n 30)",
        "(3 << 29)",
        "010000000000",
    ] {
        let tree = Tree::new(SOURCE);
        tree.write("katran/lib/bpf/other.h", &format!("#define F_NEW {flag}\n"));
        assert!(tree.apply(&[]).unwrap_err().contains("F_NEW is bit 30, too"), "{flag}");
        tree.write("katran/lib/bpf/other.h", &format!("enum f {{ F_A = 1, F_NEW = {flag}, }};\n"));
        assert!(tree.apply(&[]).unwrap_err().contains("F_NEW is bit 30, too"), "{flag}");
        assert_eq!(tree.read(BALANCER), SOURCE);
    }
    let tree = Tree::new(SOURCE);
    tree.write("katran/lib/bpf/other.h", "#define F_NEW OTHER_NAME\n");
    assert!(tree.apply(&[]).unwrap_err().contains("cannot tell which bits F_NEW has"));
    let tree = Tree::new(SOURCE);
    std::fs::rename(tree.path(BALANCER), tree.path("katran/lib/bpf/balancer_kern.c")).unwrap();
    assert!(tree.apply(&[]).unwrap_err().contains("balancer_kern.c, so it is from before 2023-08"));

    for option in [&[][..], &["--revert"]] {
        let tree = Tree::new(SOURCE);
        tree.write(HEADER, "/* somebody's */\n");
        assert!(tree.apply(option).unwrap_err().contains("is not ours"));
        assert_eq!(tree.read(HEADER), "/* somebody's */\n");
    }
    let nothing = tempfile::tempdir().unwrap();
    assert!(
        apply(nothing.path(), &[]).unwrap_err().contains("give the top of a Katran source tree")
    );
}

#[test]
fn nothing_but_our_lines_differs_afterwards() {
    // A form feed, a byte that is no UTF-8, no line end at the end.
    let odd =
        SOURCE.replace("#include <stddef.h>", "// page\u{c} break \u{2028}\n#include <stddef.h>");
    for source in [odd.clone(), odd.trim_end().to_owned()] {
        let tree = Tree::new(&source);
        tree.apply(&[]).unwrap();
        assert_eq!(tree.read(BALANCER).replace(INCLUDE, "").replace(CALL, ""), source);
        tree.apply(&["--revert"]).unwrap();
        assert_eq!(tree.read(BALANCER), source);
    }
    let bytes = [SOURCE.as_bytes(), b"// caf\xe9\n"].concat();
    let tree = Tree::new("");
    std::fs::write(tree.path(BALANCER), &bytes).unwrap();
    tree.apply(&[]).unwrap();
    tree.apply(&["--revert"]).unwrap();
    assert_eq!(std::fs::read(tree.path(BALANCER)).unwrap(), bytes);

    let windows = SOURCE.replace('\n', "\r\n");
    let tree = Tree::new(&windows);
    assert!(tree.apply(&[]).unwrap_err().contains("CR LF"));
    assert_eq!(tree.read(BALANCER), windows);

    // A link stays a link; what cannot be written changes nothing.
    let tree = Tree::new("");
    let elsewhere = tree.path("elsewhere.c");
    std::fs::write(&elsewhere, SOURCE).unwrap();
    std::fs::remove_file(tree.path(BALANCER)).unwrap();
    std::os::unix::fs::symlink(&elsewhere, tree.path(BALANCER)).unwrap();
    tree.apply(&[]).unwrap();
    assert!(tree.path(BALANCER).is_symlink());
    tree.apply(&["--revert"]).unwrap();
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), SOURCE);
    std::fs::create_dir(tree.path(HEADER)).unwrap();
    assert!(tree.apply(&[]).unwrap_err().contains("nothing was changed"));
    assert_eq!(std::fs::read_to_string(&elsewhere).unwrap(), SOURCE);
}

#[test]
fn the_patches_only_add() {
    let patches = Path::new(env!("CARGO_MANIFEST_DIR")).join("katran-patches");
    for entry in std::fs::read_dir(patches).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "patch") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let hunks = text.split_once("\n@@").unwrap().1;
        let foreign: Vec<_> = hunks
            .lines()
            .skip(1)
            .filter(|l| !(l.starts_with('+') || l.starts_with("@@ ") && l.ends_with(" @@")))
            .collect();
        assert!(foreign.is_empty(), "{}: {foreign:?}", path.display());
    }
}

#[test]
fn katrans_tester_gets_its_fixtures_where_there_is_one() {
    let tester = "#include \"katran/lib/testing/fixtures/KatranHCTestFixtures.h\"\n\
                  #include \"katran/lib/testing/fixtures/KatranLpmSrcLookupTestFixtures.h\"\n\
                  DEFINE_bool(gue, false, \"\");\nDEFINE_int32(repeat, 1, \"\");\n\
                  void runTestsFromFixture(\n    int a,\n    int b) {\n  if (FLAGS_gue) {\n    a();\n  }\n}\n\
                  void other() {\n}\n";
    let tree = Tree::new(SOURCE);
    std::fs::create_dir_all(tree.path("katran/lib/testing/framework")).unwrap();
    std::fs::create_dir_all(tree.path("katran/lib/testing/fixtures")).unwrap();
    tree.write(TESTER, tester);
    tree.apply(&[]).unwrap();
    tree.apply(&["--check"]).unwrap();
    assert!(tree.path(FIXTURES).exists());
    let patched = tree.read(TESTER);
    let order = [
        "HCTest",
        "InnerDstTest",
        "LpmSrc",
        "(gue",
        "(inner_dst",
        "(repeat",
        "FLAGS_gue",
        "FLAGS_inner_dst",
        "other",
    ];
    let places: Vec<_> = order.iter().map(|text| patched.find(text).unwrap()).collect();
    assert!(places.is_sorted(), "{patched}");
    assert!(tree.apply(&["--diff"]).unwrap().contains(&format!("+++ b/{FIXTURES}")));
    tree.apply(&["--revert"]).unwrap();
    assert_eq!(tree.read(TESTER), tester);
    assert!(!tree.path(FIXTURES).exists());

    tree.write(TESTER, &tester.replace("runTestsFromFixture", "runThem"));
    let refusal = tree.apply(&[]).unwrap_err();
    assert!(refusal.contains("not exactly one function runTestsFromFixture()"), "{refusal}");
    assert_eq!(tree.read(BALANCER), SOURCE);
}

/// On the commit that the patches are made for, the result is the very file that they name.
#[test]
#[ignore = "needs Katran's sources: scripts/test --katran"]
fn a_real_katran_takes_them() {
    let source = std::env::var_os("KATRAN_SOURCE").expect("KATRAN_SOURCE, a Katran source tree");
    let tree = Tree::new(&std::fs::read_to_string(Path::new(&source).join(BALANCER)).unwrap());
    for file in [CONSTS, LIBRARY] {
        tree.write(file, &std::fs::read_to_string(Path::new(&source).join(file)).unwrap());
    }
    for dir in ["framework", "fixtures"] {
        std::fs::create_dir_all(tree.path("katran/lib/testing").join(dir)).unwrap();
    }
    tree.write(TESTER, &std::fs::read_to_string(Path::new(&source).join(TESTER)).unwrap());
    tree.apply(&["--revert"]).unwrap();
    let original = tree.read(BALANCER);
    for shift in ["", "/* a line more */\n"] {
        tree.write(BALANCER, &format!("{shift}{original}"));
        tree.apply(&["--diff"]).unwrap();
        assert_eq!(tree.read(BALANCER), format!("{shift}{original}"), "it only prints");
        let said = tree.apply(&[]).unwrap();
        let base = "(Katran 19f08fec)";
        assert_eq!(said.contains(base), shift.is_empty(), "is this the base commit? {said}");
        tree.apply(&["--check"]).unwrap();
        assert_eq!(tree.read(BALANCER).matches(CALL).count(), 1);
        tree.apply(&["--revert"]).unwrap();
        assert_eq!(tree.read(BALANCER), format!("{shift}{original}"));
    }
}

/// Katran's own tester, of a tree with the patches, with their object and one that has nothing of them.
#[test]
#[ignore = "needs Katran's tester: scripts/test --katran"]
fn katrans_own_tester_finds_packets_as_expected() {
    let Some(tester) = std::env::var_os("KATRAN_TESTER") else {
        eprintln!("skipped: KATRAN_TESTER is not set");
        return;
    };
    let run = |object: &str| {
        let script = "ip link set lo up && exec \"$0\" -balancer_prog \"$1\" -test_from_fixtures=true \
                      -inner_dst=true -logtostderr";
        let output = Command::new("unshare")
            .args(["--net", "bash", "-c", script])
            .arg(&tester)
            .arg(std::env::var_os(object).unwrap())
            .output()
            .unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let said = run("KATRAN_BALANCER");
    assert!(said.contains("inner destinations: all packets are as expected"), "{said}");
    if std::env::var_os("KATRAN_UNPATCHED").is_some() {
        let said = run("KATRAN_UNPATCHED");
        assert!(said.contains("was the program built with -DINNER_DST?"), "{said}");
    }
}
