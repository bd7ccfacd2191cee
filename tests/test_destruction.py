"""Every call that can remove, replace or empty something, with the reason why it harms nothing of the user's.

A new one in any module of the project is an error here until it stands in the table, and so is one that has gone.
"""

import ast
import re

import pytest

from tests.project import product_files, product_name

# Methods of paths and files, and functions of os and shutil; named or called, by whatever object.
METHODS = {"unlink", "rmdir", "rename", "write_text", "write_bytes", "truncate", "symlink_to", "hardlink_to", "touch"}
FUNCTIONS = {"os": {"remove", "unlink", "rmdir", "removedirs", "rename", "renames", "replace", "truncate", "ftruncate",
                    "link", "symlink", "open"},
             "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copyfileobj", "copytree"}}
WRITERS = {"replacing", "SummaryWriter", "savefig", "mkdtemp", "TemporaryDirectory"}  # called by name
MODE = re.compile(r"[rwaxbt+]{1,4}")

# Module and function -> (its calls in their order, why they harm nothing of the user's).
SAFE = {
    "arguments.exit_code": ("os.open", "the null device, in the place of an output that cannot be written"),
    "download.acquire._finish": ("rmdir", "the folder of archives, only when empty"),
    "download.acquire._copied":
        ("replacing shutil.copyfileobj", "copies beside, then http.put, which keeps what differs"),
    "download.unpack._errors": ("shutil.rmtree", "the staging folder of this very archive, from staging_folder"),
    "download.unpack.move_into": ("shutil.rmtree", "the same folder, when everything in it has been moved"),
    "download.archives._write": ("open(wb)", "within that staging folder"),
    "download.archives._SevenZip.extract": ("shutil.rmtree", "that staging folder"),
    "download.unpack._merge": ("os.replace", "to a name that nothing has; single files go by replace_with_backup"),
    "download.notes.write": ("replacing", "a name that is free or holds a note of ours"),
    "download.notes.forget": ("unlink unlink", "the part and the note, only where the note is ours"),
    "download.notes.remove_archive": ("unlink", "an archive with our note and the digest of it, not to be kept"),
    "download.notes.remove_lock": ("unlink", "a lock that is empty"),
    "data.bad_samples.record": ("open(ab)", "adds lines"),
    "data.prepared.keep": ("replacing", "NAME-DIGEST.npz in prepared/ of the cache: made of a digest, made again"),
    "training.planner.write_plan": ("replacing", "plan_KEY.json: a name made of a digest, made again when it is gone"),
    "training.plans.calibrate": ("replacing", "the calibration, made again when it is gone"),
    "training.attention.choose_kernel": ("replacing", "the kernels timed, made again when it is gone"),
    "checkpoint.save": ("replacing", "what is there and is not ours is set aside before"),
    "checkpoint.export": ("replacing replacing", "exports: behind outputs.writing, or into a new folder"),
    "checkpoint.rotate": ("unlink", "checkpoints that hold our digest"),
    "download.youtube.fetch_clips":
        ("replacing", "the ledger, all of whose rows are written again; another file is kept beside"),
    "download.youtube._fetch_all": ("open(a)", "adds rows to the ledger"),
    "download.debian.fetch_by_apt": ("TemporaryDirectory", "a new folder"),
    "distributed.World.quiet": ("open(w)", "os.devnull"),
    "files.replacing": ("open(?) os.replace unlink", "NAME.PROCESS.tmp, over NAME: each caller stands in this table"),
    "files.rename_to_free": ("os.link os.rename", "never over what is there"),
    "files.set_aside": ("os.rename", "to a name that nothing has"),
    "files.remove_left": ("unlink", "NAME.PROCESS.tmp of replacing, where NAME is one of ours"),
    "files.replace_with_backup":
        ("unlink os.replace",
         "what differs and is not ours has a second name by then; the new file goes where both are equal"),
    "files.back_up": ("os.link open(x) os.replace", "to a name that nothing has, taken first"),
    "files.sync_file": ("open(rb+)", "writes nothing"),
    "files.sync_folder": ("os.open", "reads only"),
    "files.locked": ("unlink", "NAME.lock, only when empty"),
    "download.state.State.write_licence": ("replacing", "only over a text whose digest the marker knows"),
    "doctor.check_memory": ("shutil.copytree", "kept plans, into the temporary folder"),
    "doctor.main": ("TemporaryDirectory", "a new folder"),
    "export.hub.write": ("TemporaryDirectory write_text os.rename", "a new folder beside, which becomes the one that "
                         "was asked for where nothing is"),
    "export.onnx.write": ("TemporaryDirectory write_text shutil.copyfile os.rename",
                           "in a new folder, which then gets a name that nothing has"),
    "export.onnx.write_rules": ("write_text write_text", "in that new folder"),
    "sets.emoji._render": ("replacing", "pictures that are not there"),
    "download.state.write_marker": ("replacing", "over a marker; another file of this name is kept beside"),
    "download.state.write_contents":
        ("replacing open(wt)", "in the hidden folder of lists, beside ARCHIVE.jsonl.gz; then replace_with_backup"),
    "download.local._link": ("unlink symlink_to", "a link into a folder that --local named before"),
    "memory.devices.reset_peak": ("write_text", "a file of /proc"),
    "training.outputs._list": ("replacing", "the ledger of an output folder"),
    "training.outputs.write_settings": ("replacing", "only over what the ledger lists"),
    "training.outputs.remove_run":
        ("unlink", "files that hold our digest, have our name, hold our curves alone or stand in the ledger"),
    "training.outputs.go_back": ("replacing", "its own note of the work"),
    "training.outputs.finish_going_back": ("unlink", "the note of that work"),
    "training.outputs._move": ("shutil.move", "into a new folder abandoned_TIME"),
    "training.outputs._copy": ("replacing shutil.copyfileobj", "into a new folder abandoned_TIME"),
    "data.cache._make_entry":
        ("os.rename unlink", "an entry of the cache gets its name, under its lock; its journal goes"),
    "data.cache.PartialEntry.__init__":
        ("unlink", "NAME.PROCESS.tmp of the four files of a partial entry, by their names"),
    "data.cache.PartialEntry._recover":
        ("truncate", "the two files of a partial entry, what is not in the journal as done"),
    "data.cache.PartialEntry.finish": ("replacing replacing", "in the folder of the partial entry"),
    "data.cache._open_to_append": ("os.open", "one of these two files, no link is followed"),
    "data.cache._remove_partial":
        ("unlink rmdir", "the files of a partial entry, by their names, and the folder when empty"),
    "evaluation.report.write_new": ("replacing unlink", "never over what is there; removes what it has just written"),
    "search.build._Building._write":
        ("replacing unlink", "its own list of what was skipped; the journal, once the index holds all of it"),
    "search.journal.Journal.__init__":
        ("open(?) truncate", "encoded.journal in the folder of the index: what a kill cut off, or another model made"),
    "search.index.write_index": ("replacing", "the index, over an earlier one of the same folder, under its lock"),
    "download.unpack.remove_below": ("shutil.rmtree unlink rmdir", "ARCHIVE-DIGEST and, of clips, process-NUMBER in "
                                     "our staging folders, and these folders when empty"),
    "training.tracking.Tracker.__init__": ("open(ab) SummaryWriter", "adds records; an event file is a new one"),
    "training.examples.write_projector": ("replacing", "files of a run, behind outputs.writing"),
    "training.tracking.drop_after": ("replacing", "our records; a file with lines of others is kept beside before"),
    "training.tracking.drop_events_after":
        ("replacing unlink", "our event files, by name or by what they hold, once one of them holds all that is kept"),
    "download.http._Part.store": ("open(ab)", "the part, at a name from notes.part_of"),
    "download.http._Part.restart": ("unlink", "the same part"),
    "data.workers._pickled": ("open(wb)", "a file in memory, by its descriptor"),
}


def destructive(source: str) -> dict[str, str]:
    """Function (with its class, or "" at the top of the module) -> its calls of that kind, in order, in words."""
    found: dict[str, list[str]] = {}
    _look(ast.parse(source), "", found)
    return {where: " ".join(calls) for where, calls in found.items()}


def _look(node: ast.AST, where: str, found: dict[str, list[str]]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            _look(child, f"{where}.{child.name}".lstrip("."), found)
            continue
        if word := _word(child):
            found.setdefault(where, []).append(word)
        _look(child, where, found)


def _word(node: ast.AST) -> str:
    """What this very node does, "" for nothing of the kind."""
    if isinstance(node, ast.ImportFrom) and node.module in FUNCTIONS:
        return " ".join(sorted({name.name for name in node.names} & FUNCTIONS[node.module]))
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in FUNCTIONS:
            return f"{node.value.id}.{node.attr}" if node.attr in FUNCTIONS[node.value.id] else ""
        return node.attr if node.attr in METHODS else ""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "replace" and isinstance(node.func, ast.Attribute) and len(node.args) == 1 and not node.keywords:
            return "replace"  # of a path: that of text takes two, that of dataclasses keywords
        if name in WRITERS:
            return name
        return f"open({_mode(node)})" if name == "open" and _mode(node) else ""
    return ""


def _mode(call: ast.Call) -> str:
    """The mode of a call of open that may write, "?" where it is not written there, "" where it only reads."""
    if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os":
        return ""  # counted by its name
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[:2]
    texts = [node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    modes = [text for text in texts if MODE.fullmatch(text)]
    if not modes and len(call.args) > 1 and isinstance(call.func, ast.Name) and len(texts) < len(call.args[1:2]):
        return "?"
    return next((mode for mode in modes if set(mode) & set("wax+")), "")


def test_every_call_that_can_destroy_stands_in_the_table() -> None:
    found = {f"{product_name(path)}.{where}": calls for path in product_files()
             for where, calls in destructive(path.read_text("utf-8")).items()}
    table = {where: calls for where, (calls, _) in SAFE.items()}
    changed = {where: (found.get(where), table.get(where)) for where in found.keys() | table.keys()
               if found.get(where) != table.get(where)}
    assert changed == {}, "(what the code does now, what the table says): amend SAFE, with the reason"


def test_every_row_has_a_reason() -> None:
    assert [where for where, (_, reason) in SAFE.items() if len(reason) < 10] == []


@pytest.mark.parametrize(("code", "calls"), [
    ("path.unlink()", "unlink"), ("os.remove(x)", "os.remove"), ("gone = os.replace", "os.replace"),
    ("shutil.rmtree(x)", "shutil.rmtree"), ("from shutil import rmtree", "rmtree"), ("a.replace(b)", "replace"),
    ("map(Path.unlink, paths)", "unlink"), ("open(x, 'w')", "open(w)"), ("x.open(mode='r+')", "open(r+)"),
    ("gzip.open(x, 'wt')", "open(wt)"), ("open(x, mode)", "open(?)"), ("x.write_text(y)", "write_text"),
    ("file.truncate(0)", "truncate"), ("with replacing(x): pass", "replacing"), ("shutil.move(x, y)", "shutil.move"),
    *((code, "") for code in ("text.replace(a, b)", "dataclasses.replace(x, y=1)", "replace(x)", "open(x)",
                              "x.open('rb')", "items.remove(x)", "items.copy()", "zip.open(name)", "open(x, 'rb')")),
])
def test_the_gate_sees_what_it_is_for(code: str, calls: str) -> None:
    assert destructive(f"class C:\n def f(self):\n  {code}") == ({"C.f": calls} if calls else {})
