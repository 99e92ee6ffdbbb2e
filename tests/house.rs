//! Which file imports which in `src`: no circles, from a floor only to those below, and in the
//! engine as its table says. Imports are read from `use` lines and from paths; a call of a method
//! is none. And the words and names of `src`: a thing has the word of its field, and a name means
//! one thing.

#![cfg(unix)] // The sources are the same everywhere.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use syn::visit::{self, Visit};

/// A path of modules and items, from the crate's root.
type Names = Vec<String>;

/// A module, with all files that it may be on one system or another.
#[derive(Default)]
struct Module {
    files: Vec<String>,
    /// What it defines.
    items: BTreeSet<String>,
    /// The types among these.
    types: BTreeSet<String>,
    /// What it imports, by the name that it has here.
    imports: BTreeMap<String, Names>,
    /// The modules of which it hands on all.
    globs: Vec<Names>,
    /// What its files name, by file.
    paths: Vec<(String, Names)>,
}

/// All modules of the crate, by their paths.
#[derive(Default)]
struct House {
    modules: BTreeMap<Names, Module>,
}

impl House {
    /// Reads the crate from its root.
    fn read() -> House {
        let mut house = House::default();
        house.read_file("lib.rs", &Names::new());
        assert!(house.modules.len() > 100, "the modules are not found");
        house
    }

    /// Reads the file of a module, and those of the modules that it declares.
    fn read_file(&mut self, file: &str, module: &Names) {
        let text = fs::read_to_string(source().join(file)).unwrap();
        let syntax = syn::parse_file(&text).unwrap_or_else(|e| panic!("{file}: {e}"));
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        let directory = match name {
            "lib.rs" | "mod.rs" => Path::new(file).parent().unwrap().to_owned(),
            _ => Path::new(file).with_extension(""),
        };
        self.read_items(&syntax.items, file, module, &directory);
    }

    fn read_items(&mut self, items: &[syn::Item], file: &str, module: &Names, directory: &Path) {
        let mut names = Finder::default();
        for item in items {
            if let syn::Item::Mod(child) = item {
                self.read_module(child, file, module, directory);
            } else {
                names.visit_item(item);
            }
        }
        let here = self.modules.entry(module.clone()).or_default();
        here.files.push(file.to_owned());
        here.items.extend(names.items);
        here.types.extend(names.types);
        here.imports.extend(names.imports);
        here.globs.extend(names.globs);
        let paths = names.paths.into_iter();
        here.paths.extend(paths.map(|path| (file.to_owned(), path)));
    }

    fn read_module(&mut self, item: &syn::ItemMod, file: &str, parent: &Names, directory: &Path) {
        let name = item.ident.to_string();
        // Tests of one file may use all.
        if matches!(name.as_str(), "tests" | "proptests") {
            return;
        }
        let module = [parent.as_slice(), std::slice::from_ref(&name)].concat();
        match &item.content {
            Some((_, items)) => self.read_items(items, file, &module, &directory.join(&name)),
            None => {
                let beside = Path::new(file).parent().unwrap();
                let path = match path_of(item) {
                    Some(path) => beside.join(path),
                    None if source().join(directory).join(format!("{name}.rs")).exists() => {
                        directory.join(format!("{name}.rs"))
                    }
                    None => directory.join(&name).join("mod.rs"),
                };
                self.read_file(path.to_str().unwrap(), &module);
            }
        }
    }

    /// Returns the path of what `names` means in a module.
    fn absolute(&self, names: &[String], module: &Names) -> Option<Names> {
        let (first, rest) = names.split_first()?;
        let parent = &module[..module.len().saturating_sub(1)];
        let base = match first.as_str() {
            "crate" => Names::new(),
            "self" => module.clone(),
            "super" if rest.first().is_some_and(|it| it == "super") => {
                return self.absolute(rest, &parent.to_vec());
            }
            "super" => parent.to_vec(),
            name => match self.modules.get(module)?.imports.get(name) {
                Some(import) if import.first().is_some_and(|it| it != name) => {
                    self.absolute(import, module)?
                }
                _ => {
                    let child = [module.as_slice(), std::slice::from_ref(first)].concat();
                    self.modules.contains_key(&child).then_some(child)?
                }
            },
        };
        Some([base.as_slice(), rest].concat())
    }

    /// Returns the files that define what has this path: none if it is a module.
    fn definers(&self, path: &[String], depth: usize) -> Vec<String> {
        if depth > 16 {
            return Vec::new();
        }
        // The longest part that is a module, and the name of the item in it.
        let lengths = (0..=path.len()).rev();
        let mut modules = lengths.filter(|end| self.modules.contains_key(&path[..*end]));
        let Some(end) = modules.next().filter(|end| *end < path.len()) else {
            return Vec::new();
        };
        let (name, module) = (&path[end], path[..end].to_vec());
        let here = &self.modules[&module];
        if here.items.contains(name) {
            return here.files.clone();
        }
        if let Some(import) = here.imports.get(name) {
            let import = self.absolute(import, &module);
            return import.map_or(Vec::new(), |it| self.definers(&it, depth + 1));
        }
        let mut all = Vec::new();
        for glob in &here.globs {
            if let Some(mut path) = self.absolute(glob, &module) {
                path.push(name.clone());
                all.extend(self.definers(&path, depth + 1));
            }
        }
        all
    }

    /// Returns which files import which, and what.
    fn imports(&self) -> BTreeMap<(String, String), String> {
        let mut all = BTreeMap::new();
        for (module, here) in &self.modules {
            for (file, path) in &here.paths {
                let Some(absolute) = self.absolute(path, module) else {
                    continue;
                };
                for definer in self.definers(&absolute, 0) {
                    if definer != *file {
                        all.insert((file.clone(), definer), path.join("::"));
                    }
                }
            }
        }
        assert!(all.len() > 500, "imports are not found");
        all
    }
}

/// The modules of the crate.
static HOUSE: LazyLock<House> = LazyLock::new(House::read);

/// Which files import which, and what.
static IMPORTS: LazyLock<BTreeMap<(String, String), String>> = LazyLock::new(|| HOUSE.imports());

/// Finds what a module's items define, import and name.
#[derive(Default)]
struct Finder {
    items: BTreeSet<String>,
    types: BTreeSet<String>,
    imports: BTreeMap<String, Names>,
    globs: Vec<Names>,
    paths: Vec<Names>,
}

impl Finder {
    fn take_tree(&mut self, tree: &syn::UseTree, before: &[String], is_handed_on: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                let before = [before, &[path.ident.to_string()]].concat();
                self.take_tree(&path.tree, &before, is_handed_on);
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                let alias = before.last().unwrap().clone();
                self.take_import(alias, before.to_vec(), is_handed_on);
            }
            syn::UseTree::Name(name) => {
                let name = name.ident.to_string();
                let path = [before, std::slice::from_ref(&name)].concat();
                self.take_import(name, path, is_handed_on);
            }
            syn::UseTree::Rename(name) => {
                let path = match name.ident == "self" {
                    true => before.to_vec(),
                    false => [before, &[name.ident.to_string()]].concat(),
                };
                self.take_import(name.rename.to_string(), path, is_handed_on);
            }
            syn::UseTree::Glob(_) => self.globs.push(before.to_vec()),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_tree(tree, before, is_handed_on);
                }
            }
        }
    }

    /// Takes an import. What a module only hands on, it doesn't use.
    fn take_import(&mut self, alias: String, path: Names, is_handed_on: bool) {
        if !is_handed_on {
            self.paths.push(path.clone());
        }
        self.imports.insert(alias, path);
    }
}

impl<'a> Visit<'a> for Finder {
    fn visit_item(&mut self, item: &'a syn::Item) {
        let name = match item {
            syn::Item::Const(it) => Some(&it.ident),
            syn::Item::Enum(it) => Some(&it.ident),
            syn::Item::Fn(it) => Some(&it.sig.ident),
            syn::Item::Macro(it) => it.ident.as_ref(),
            syn::Item::Static(it) => Some(&it.ident),
            syn::Item::Struct(it) => Some(&it.ident),
            syn::Item::Trait(it) => Some(&it.ident),
            syn::Item::Type(it) => Some(&it.ident),
            syn::Item::Union(it) => Some(&it.ident),
            _ => None,
        };
        let is_type = matches!(
            item,
            syn::Item::Enum(_) | syn::Item::Struct(_) | syn::Item::Trait(_) | syn::Item::Type(_)
        );
        self.types
            .extend(name.filter(|_| is_type).map(ToString::to_string));
        self.items.extend(name.map(ToString::to_string));
        visit::visit_item(self, item);
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        let is_handed_on = !matches!(item.vis, syn::Visibility::Inherited);
        self.take_tree(&item.tree, &[], is_handed_on);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names = path.segments.iter().map(|it| it.ident.to_string());
        self.paths.push(names.collect());
        visit::visit_path(self, path);
    }

    fn visit_attribute(&mut self, _: &'a syn::Attribute) {}

    fn visit_macro(&mut self, mac: &'a syn::Macro) {
        let text = mac
            .tokens
            .to_string()
            .replace(' ', "\u{1}")
            .replace("\u{1}::\u{1}", "::");
        for path in text.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':') {
            if path.contains("::") {
                let names = path.split("::").map(ToOwned::to_owned);
                self.paths.push(names.collect());
            }
        }
        visit::visit_macro(self, mac);
    }
}

/// Returns the path that an attribute gives a module's file.
fn path_of(item: &syn::ItemMod) -> Option<PathBuf> {
    let mut paths = item.attrs.iter().filter_map(|it| match &it.meta {
        syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(text),
                ..
            }) => Some(text.value()),
            _ => None,
        },
        _ => None,
    });
    paths.next().map(PathBuf::from)
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Returns the files that can be reached from each by imports.
fn reachable(imports: &BTreeMap<(String, String), String>) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut direct: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (from, to) in imports.keys() {
        direct.entry(from).or_default().push(to);
    }
    let reach = |from: &str| {
        let (mut seen, mut left) = (BTreeSet::new(), direct[from].clone());
        while let Some(file) = left.pop() {
            if seen.insert(file) {
                left.extend(direct.get(file).into_iter().flatten());
            }
        }
        seen
    };
    direct.keys().map(|from| (*from, reach(from))).collect()
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let imports = &*IMPORTS;
    let reachable = reachable(imports);
    let is_in_circle = |(from, to): &&(String, String)| {
        reachable
            .get(to.as_str())
            .is_some_and(|it| it.contains(from.as_str()))
    };
    let circles = imports.keys().filter(is_in_circle);
    let lines = circles.map(|key| format!("{} imports {} ({})\n", key.0, key.1, imports[key]));
    let lines: String = lines.collect();
    assert!(
        lines.is_empty(),
        "files import each other in a circle:\n{lines}"
    );
}

/// The floors of the house, from the top down, each with its files and folders. A file imports only
/// from its own floor and from those below.
const FLOORS: [(&str, &[&str]); 8] = [
    ("face", &["main.rs", "app"]),
    ("proxy", &["proxy"]),
    ("engine", &["engine"]),
    ("relay", &["engine/relay"]),
    // It shares no code with the engine.
    ("stand-in", &["simulate"]),
    (
        "sockets",
        &[
            "dial",
            "family.rs",
            "hyperkit",
            "hyperv",
            "keeper",
            "listener",
            "mio.rs",
            "stream",
            "tokio",
            "vsock.rs",
        ],
    ),
    (
        "families",
        &["address", "framing.rs", "name.rs", "services"],
    ),
    (
        "ground",
        &[
            "error.rs",
            "file.rs",
            "lock.rs",
            "nearest.rs",
            "sys",
            "thread.rs",
            "time.rs",
        ],
    ),
];

/// Returns the number of the floor on which a file stands.
fn floor_of(file: &str) -> usize {
    let stands_on = |place: &str| {
        let rest = file.strip_prefix(place);
        rest.filter(|rest| rest.is_empty() || rest.starts_with('/'))
            .map(|_| place.len())
    };
    let floors = FLOORS.iter().enumerate();
    let places = floors.flat_map(|(floor, (_, places))| places.iter().map(move |it| (it, floor)));
    let fitting = places.filter_map(|(place, floor)| Some((stands_on(place)?, floor)));
    let longest = fitting.max_by_key(|(length, _)| *length);
    longest
        .unwrap_or_else(|| panic!("on which floor is {file}?"))
        .1
}

#[test]
fn imports_go_to_the_same_floor_or_down() {
    let imports = &*IMPORTS;
    let goes_up = |(from, to): &&(String, String)| floor_of(from) > floor_of(to);
    let lines = imports.keys().filter(goes_up);
    let lines = lines.map(|key| format!("{} imports {} ({})\n", key.0, key.1, imports[key]));
    let lines: String = lines.collect();
    assert!(
        lines.is_empty(),
        "files import from a floor above:\n{lines}"
    );
}

/// Returns the module of the engine that a file is of, or the folder or module beside the engine.
fn module_of(file: &str) -> &str {
    let file = file.strip_prefix("engine/").unwrap_or(file);
    let end = file.find(['/', '.']).unwrap_or(file.len());
    &file[..end]
}

#[test]
fn the_engine_imports_what_its_table_says() {
    /// What every module of the engine may import.
    const COMMON: [&str; 5] = ["address", "error", "lock", "name", "time"];
    let text = fs::read_to_string(source().join("engine/mod.rs")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells = line.strip_prefix("//! | [`")?;
        let (module, cells) = cells.split_once("`]")?;
        Some((
            module,
            cells.trim_end_matches([' ', '|']).rsplit_once('|')?.1,
        ))
    });
    let rows: Vec<_> = rows.collect();
    let imports = &*IMPORTS;
    let mut wrong = Vec::new();
    let modules = imports
        .keys()
        .map(|(from, _)| from)
        .filter(|it| it.starts_with("engine/"));
    for module in modules.map(|it| module_of(it)) {
        if !rows.iter().any(|(it, _)| *it == module) {
            wrong.push(format!("{module} is not in the table"));
        }
    }
    for (at, (module, cell)) in rows.iter().enumerate() {
        let below = || rows[at + 1..].iter().map(|(it, _)| *it);
        let named: BTreeSet<&str> = cell.split('`').skip(1).step_by(2).collect();
        let its = imports.keys().filter(|(from, to)| {
            from.starts_with("engine/") && module_of(from) == *module && to != "engine/mod.rs"
        });
        let its: BTreeSet<&str> = its.map(|(_, to)| module_of(to)).collect();
        for import in its
            .iter()
            .filter(|it| *it != module && !COMMON.contains(it))
        {
            let is_of_engine = rows.iter().any(|(it, _)| it == import);
            let is_below = below().any(|it| it == *import);
            let is_meant = named.contains(import) || is_below && cell.contains("all below");
            if !is_meant || is_of_engine && !is_below {
                wrong.push(format!("{module} imports {import}"));
            }
        }
        let unused = named.difference(&its);
        wrong.extend(unused.map(|it| format!("{module} doesn't import {it}")));
    }
    assert!(rows.len() > 10, "the table is not found");
    assert!(wrong.is_empty(), "src/engine/mod.rs: {}", wrong.join("; "));
}

/// The private words that design and code once had, each with the word of the field that is used in
/// its place, and the files in which it means something else.
const REPLACED_WORDS: [(&str, &str, &[&str]); 19] = [
    ("bell", "notifier", &[]),
    ("board", "status cell", &[]),
    ("books", "counts", &[]),
    ("bridge", "adapter, relay threads", &[]),
    ("complaint", "log limiter, error", &[]),
    ("complaints", "log limiter, errors", &[]),
    ("crossing", "adapter, relay threads", &[]),
    ("crowd", "clients", &[]),
    ("delicate", "needs_graceful_close", &[]),
    ("farewell", "graceful close", &[]),
    ("forgive", "end_slowness", &[]),
    ("hurry", "phase of the stop", &[]),
    // Of text: what is left out.
    ("leaving", "closing", &["address/uri.rs"]),
    ("polite", "graceful, orderly", &[]),
    ("presence", "health", &[]),
    ("quiet", "idle", &[]),
    ("shelf", "free list", &[]),
    ("thawed", "resumed_at", &[]),
    ("ticket", "slot", &[]),
];

/// Functions of these names say nothing of their object, with the files that may have them.
const NAMELESS_FUNCTIONS: [(&str, &[&str]); 4] = [
    ("again", &["app/serve.rs"]),
    ("apart", &[]),
    ("is", &[]),
    ("tell", &[]),
];

/// The places with a vocabulary of their own, in which a name of a type may mean another thing than
/// elsewhere: the stand-in VM and the simulated world, which play the proxy's peers.
const OTHER_VOCABULARIES: [&str; 2] = ["proxy/sim/", "simulate/"];

/// The names of types that several modules may define, each with the reason.
const SHARED_NAMES: [(&str, &str); 6] = [
    ("Identity", "one for each system"),
    (
        "Listener",
        "the public sockets: blocking, for mio, for tokio, of one family",
    ),
    (
        "Pipe",
        "the trait, and the system's pipe that it is made for",
    ),
    ("SocketFile", "one for each system"),
    (
        "Source",
        "public: where clients come from, and which program keeps a VM",
    ),
    (
        "Stream",
        "the public sockets: blocking, for mio, for tokio, of one family",
    ),
];

/// Splits text into its words: those of sentences, and those of names in either case.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for c in text.chars() {
        let begins = c.is_uppercase() && before.is_lowercase();
        if begins || !c.is_alphabetic() {
            words.push(String::new());
        }
        if c.is_alphabetic() {
            let word = words.last_mut().expect("there is always one");
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words
}

/// Returns all files below a folder of the sources.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(files_below(&path)),
            false => files.push(path),
        }
    }
    files
}

/// Finds calls of std's functions that panic where the system gives no thread, outside of tests.
#[derive(Default)]
struct PanickingThreads {
    found: usize,
}

/// Returns whether an item is there for tests only.
fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|it| match &it.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => {
            let words = list.tokens.to_string();
            // `not(test)` and `any(…, test)` are not for them alone.
            words == "test" || words.starts_with("all (") && words.contains("test")
        }
        _ => false,
    })
}

impl<'a> Visit<'a> for PanickingThreads {
    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names: Vec<String> = path
            .segments
            .iter()
            .map(|it| it.ident.to_string())
            .collect();
        self.found += usize::from(names.ends_with(&["thread".to_owned(), "spawn".to_owned()]));
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'a syn::ExprMethodCall) {
        let on_scope = match &*call.receiver {
            syn::Expr::Path(receiver) => receiver.path.is_ident("scope"),
            _ => false,
        };
        self.found += usize::from(on_scope && call.method == "spawn");
        visit::visit_expr_method_call(self, call);
    }
}

/// Returns whether a text of Rust starts threads by functions that panic.
fn panics_without_threads(text: &str) -> bool {
    let mut calls = PanickingThreads::default();
    calls.visit_file(&syn::parse_file(text).unwrap());
    calls.found > 0
}

#[test]
fn no_thread_is_started_by_a_function_that_panics() {
    for (text, panics) in [
        ("fn f() { std::thread::spawn(|| ()); }", true),
        (
            "fn f() { thread::scope(|scope| { scope.spawn(|| ()); }) }",
            true,
        ),
        ("fn f() { thread::Builder::new().spawn(|| ()); }", false),
        (
            "#[cfg(test)] mod tests { fn f() { thread::spawn(|| ()); } }",
            false,
        ),
    ] {
        assert_eq!(panics_without_threads(text), panics, "{text}");
    }
    let mut wrong = Vec::new();
    for path in files_below(&source()) {
        let file = path.strip_prefix(source()).unwrap().to_str().unwrap();
        // The files of modules that are for tests: `mod tests;` in another.
        let is_test = |part: &str| ["tests", "tests.rs", "sim", "proptests.rs"].contains(&part);
        if !file.ends_with(".rs") || file.split('/').any(is_test) {
            continue;
        }
        if panics_without_threads(&fs::read_to_string(&path).unwrap()) {
            wrong.push(format!(
                "{file}: start threads by crate::thread, which fails and says why"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The longest line of a comment, in characters.
const LONGEST_COMMENT: usize = 100;

/// Returns whether a line is one of a comment that has too many characters. A row of a table can't
/// be broken.
fn is_long_comment(line: &str) -> bool {
    let line = line.trim_end();
    let begun = line.trim_start();
    let text = begun.trim_start_matches(['/', '!']).trim_start();
    begun.starts_with("//") && !text.starts_with('|') && line.chars().count() > LONGEST_COMMENT
}

#[test]
fn lines_of_comments_are_short() {
    let long = format!("    /// {}", "word ".repeat(20));
    assert!(is_long_comment(&long) && !is_long_comment(&long[8..]));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for path in [root.join("src"), root.join("tests")]
        .iter()
        .flat_map(|it| files_below(it))
    {
        let file = path.strip_prefix(root).unwrap().to_str().unwrap();
        let is_built = file.split('/').any(|part| part == "target");
        if !file.ends_with(".rs") || is_built {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let long = text
            .lines()
            .enumerate()
            .filter(|(_, line)| is_long_comment(line));
        wrong.extend(long.map(|(number, _)| format!("{file}:{}", number + 1)));
    }
    assert!(
        wrong.is_empty(),
        "comments of more than {LONGEST_COMMENT} characters in a line:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn a_thing_has_the_word_that_its_field_has_for_it() {
    let files = files_below(&source());
    assert!(files.len() > 300, "the sources are not found");
    let mut wrong = Vec::new();
    for path in files {
        let file = path.strip_prefix(source()).unwrap();
        let file = file.to_str().unwrap().replace('\\', "/");
        let text = fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let words = words(line);
            for (word, instead, exceptions) in REPLACED_WORDS {
                let is_used = words.iter().any(|it| it == word);
                if is_used && !exceptions.contains(&file.as_str()) {
                    wrong.push(format!("{file}:{}: {word} is {instead}", number + 1));
                }
            }
            for (name, exceptions) in NAMELESS_FUNCTIONS {
                let mut begins = [format!("fn {name}("), format!("fn {name}<")].into_iter();
                if begins.any(|it| line.contains(&it)) && !exceptions.contains(&file.as_str()) {
                    wrong.push(format!("{file}:{}: fn {name}: of what?", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_type_has_a_name_of_its_own() {
    // The files that define a type of this name, by the vocabulary and the name.
    let mut files: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for module in HOUSE.modules.values() {
        let file = module.files[0].as_str();
        let own = OTHER_VOCABULARIES.iter().find(|it| file.starts_with(**it));
        let vocabulary = own.copied().unwrap_or("the proxy");
        for name in &module.types {
            files.entry((vocabulary, name)).or_default().push(file);
        }
    }
    assert!(files.len() > 600, "the types are not found");
    files.retain(|_, files| files.len() > 1);
    let may_be_shared = |name: &str| SHARED_NAMES.iter().any(|(it, _)| *it == name);
    let wrong = files.iter().filter(|((_, name), _)| !may_be_shared(name));
    let lines = wrong.map(|((_, name), files)| format!("{name}: {}\n", files.join(", ")));
    let lines: String = lines.collect();
    assert!(lines.is_empty(), "names of several types:\n{lines}");
    for (name, _) in SHARED_NAMES {
        let is_shared = files.keys().any(|(_, it)| *it == name);
        assert!(is_shared, "only one type is named {name}");
    }
}
