"""Folders, globs and single files: audio by name and content, with its side files; tars and tables on the way."""

import glob
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from ..storage.stores import has_scheme, is_remote
from ..tokenizers.spec import UserError
from .entries import AudioError, Entry, Label
from .files import Tree, tree_of
from .labels import LabelError, decode_text, parse_ctm
from .sniff import AUDIO_SUFFIXES
from .source_manifests import manifest_lines
from .source_parquet import is_table, table_entries
from .source_paths import full_path, is_audio, read_small
from .source_rows import LineErrors, Mistake, manifest_error
from .source_sides import describe, side_stems
from .source_tar import is_tar, tar_entries

_TRANSCRIPTS = ".trans.txt"  # LibriSpeech's
_SIDES_AHEAD = 16


def require_listable(tree: Tree) -> bool:
    """Walk a folder once, so that what cannot be listed, and mistakes in transcripts, are told before anything is done.

    Returns whether it holds transcripts as LibriSpeech has them. Raises `UserError`.
    """
    found = False
    for folder, names in _folders(tree, ""):
        for name in names:
            if name.endswith(_TRANSCRIPTS):
                _transcripts(tree.root, os.path.join(folder, name))
                found = True
    return found


def folder_entries(tree: Tree, skipped: Counter[str]) -> Iterator[Entry]:
    """Recordings at any depth, sorted by name; hidden names and links to folders are passed over."""
    yield from _walked(tree, "", skipped)
    yield from stray_entries(tree.strays)


def stray_entries(paths: Iterable[str]) -> Iterator[Entry]:
    """Objects whose names cannot be asked for, so that nobody can say whether they are audio; see `can_be_served`."""
    told = "the object's name has '.' or '..' in it, or begins like a URL or with a slash; give it another one"
    for path in sorted(paths):
        leads_out = os.path.isabs(path) or has_scheme(path)
        yield Entry(path=f"./{path}" if leads_out else path, error=AudioError("unsafe-name", told))


def glob_paths(pattern: str, root: str, exclude: str) -> list[str]:
    """Files that a glob matches, relative to `root`, sorted, without those below `exclude`."""
    dataset = os.path.realpath(exclude) + os.sep
    return sorted(
        os.path.relpath(path, root)
        for path in glob.glob(pattern, recursive=True)
        if not os.path.isdir(path) and not (exclude and os.path.realpath(path).startswith(dataset))
    )


def listed_entries(tree: Tree, paths: Iterable[str], skipped: Counter[str]) -> Iterator[Entry]:
    """Recordings of files that were named, with the side files that lie beside them, named or not."""
    for path, group in groupby(paths, key=lambda path: path.rpartition("/")[0]):
        names = [found.rpartition("/")[2] for found in group]
        folder = _Folder.read(tree, path, _visible(tree, path), wanted=names)
        for name in names:
            yield from folder.entries(name, skipped)


def file_entry(root: str, name: str) -> Iterator[Entry]:
    """One file, taken for a recording whatever its name, with its side files."""
    tree = tree_of(root)
    folder = _Folder.read(tree, "", _visible(tree, ""), wanted=[name])
    skipped: Counter[str] = Counter()
    yield folder.described(Entry(path=name), skipped)


@dataclass(slots=True)
class _Folder:
    """The files of one folder: which is a recording, which lies beside one."""

    tree: Tree
    path: str  # relative to the tree's root
    stems: set[str] = field(default_factory=set)  # of recordings
    audio: set[str] = field(default_factory=set)  # known by their content only
    sides: dict[str, dict[str, str]] = field(default_factory=dict)  # stem -> suffix -> name
    used: set[str] = field(default_factory=set)  # names that say something of recordings
    texts: dict[str, str] = field(default_factory=dict)  # LibriSpeech's, by recording
    words: dict[str, tuple[Label, ...]] = field(default_factory=dict)  # from CTM files, by recording
    phones: dict[str, tuple[Label, ...]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)  # suffixes of CTM files that cannot be read
    upcoming: deque[str] = field(default_factory=deque)  # side files that will be asked for
    fetching: dict[str, Future[bytes]] = field(default_factory=dict)

    @classmethod
    def read(cls, tree: Tree, path: str, names: list[str], *, wanted: list[str] | None = None) -> "_Folder":
        """What lies in a folder. Content is looked at only where names do not say what a file is, and it is wanted."""
        folder = cls(tree, path)
        unknown = []
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in AUDIO_SUFFIXES:
                folder.stems.add(stem)
            else:
                unknown.append(name)
        for name in [name for name in unknown if not folder._take(name)]:
            if wanted is not None and name not in wanted:
                continue
            if not folder._is_container(name) and is_audio(tree.root, folder._relative(name)):
                folder.audio.add(name)
        if folder.audio:
            folder.stems |= {os.path.splitext(name)[0] for name in folder.audio}
            for name in unknown:
                if name not in folder.used | folder.audio:
                    folder._take(name)
        stems = dict.fromkeys(os.path.splitext(name)[0] for name in (names if wanted is None else wanted))
        folder.upcoming = deque(side for stem in stems for side in folder.sides.get(stem, {}).values())
        return folder

    def entries(self, name: str, skipped: Counter[str]) -> Iterator[Entry]:
        """What one file gives: a recording, all that a tar or a table holds, or nothing."""
        suffix = os.path.splitext(name)[1].lower()
        relative = self._relative(name)
        if suffix in AUDIO_SUFFIXES or name in self.audio:
            yield self.described(Entry(path=relative), skipped)
        elif name in self.used:
            return
        elif is_tar(self.tree.root, relative):
            yield from tar_entries(self.tree.root, relative, skipped)
        elif is_table(self.tree.root, relative):
            yield from map(_inside, table_entries(self.tree.root, relative))
        else:
            skipped[suffix or "no suffix"] += 1

    def described(self, entry: Entry, skipped: Counter[str]) -> Entry:
        """The entry with what lies beside it. Side files that cannot be read are counted in `skipped`."""
        stem = os.path.splitext(os.path.basename(entry.path))[0]
        while self.bad:
            skipped[f"{self.bad.pop()} that cannot be read"] += 1
        found = {suffix: partial(self._side, name) for suffix, name in self.sides.get(stem, {}).items()}
        described = describe(found, lambda suffix: skipped.update({f"{suffix} that cannot be read": 1}))
        if stem in self.texts and described.text is None:
            described.text = self.texts[stem]
            described.speaker = described.speaker or stem.partition("-")[0]
        described.words = self.words.get(stem) if described.words is None else described.words
        described.phones = self.phones.get(stem) if described.phones is None else described.phones
        return replace(entry, **described.fields())

    def _side(self, name: str) -> bytes:
        """A side file's bytes. From a store, the next ones are fetched meanwhile, in the order of the recordings."""
        while self.tree.background is not None and self.upcoming and len(self.fetching) < _SIDES_AHEAD:
            following = self.upcoming.popleft()
            job = self.tree.background.submit(read_small, self.tree.root, self._relative(following))
            self.fetching[following] = job
        job = self.fetching.pop(name, None)
        return read_small(self.tree.root, self._relative(name)) if job is None else job.result()

    def _relative(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    def _is_container(self, name: str) -> bool:
        return is_tar(self.tree.root, self._relative(name)) or is_table(self.tree.root, self._relative(name))

    def _take(self, name: str) -> bool:
        """Whether a file says something of this folder's recordings; if so, it is noted."""
        if name.endswith(_TRANSCRIPTS):
            self.texts |= _transcripts(self.tree.root, self._relative(name))
        elif name.lower().endswith(".ctm"):
            self._take_ctm(name)
        else:
            for stem, suffix in side_stems(name):
                if stem in self.stems:
                    self.sides.setdefault(stem, {}).setdefault(suffix, name)
                    break
            else:
                return False
        self.used.add(name)
        return True

    def _take_ctm(self, name: str) -> None:
        try:
            labels = parse_ctm(decode_text(read_small(self.tree.root, self._relative(name))))
        except (LabelError, AudioError):
            self.bad.append(".ctm")
            return
        level = self.phones if "phone" in name.lower() else self.words
        level |= labels


def _walked(tree: Tree, path: str, skipped: Counter[str]) -> Iterator[Entry]:
    found = tree.names(path)
    folder = _Folder.read(tree, path, [name for name, is_folder in found if not is_folder])
    for name, is_folder in found:
        if is_folder:
            yield from _walked(tree, f"{path}/{name}" if path else name, skipped)
        else:
            yield from folder.entries(name, skipped)


def _folders(tree: Tree, path: str) -> Iterator[tuple[str, list[str]]]:
    found = tree.names(path)
    yield path, [name for name, is_folder in found if not is_folder]
    for name, is_folder in found:
        if is_folder:
            yield from _folders(tree, f"{path}/{name}" if path else name)


def _visible(tree: Tree, path: str) -> list[str]:
    return [name for name, is_folder in tree.names(path) if not is_folder]


def _transcripts(root: str, path: str) -> dict[str, str]:
    """Texts by recording, from lines `ID TEXT`. Raises `UserError`."""
    try:
        manifest = full_path(root, path)
    except AudioError as error:
        raise UserError(f"Cannot read {os.path.join(root, path)!r}: {error.message}.") from error
    texts = {}
    for number, line in manifest_lines(manifest):
        if not line.strip():
            continue
        try:
            name, blank, text = line.decode().strip().partition(" ")
            if not blank:
                raise Mistake(f"there is no text behind {name[:100]!r}")
        except LineErrors as error:
            raise manifest_error(manifest, number, error, "RECORDING TEXT, as LibriSpeech has it.") from error
        texts[name] = text
    return texts


def _inside(entry: Entry) -> Entry:
    """The entry, or its error: a table that happens to lie in a folder may not name files elsewhere on the machine."""
    if not os.path.isabs(entry.path) and not is_remote(entry.path):
        return entry
    message = "a table in this folder names a file outside of it; if that is meant, give the table itself as a source"
    return replace(entry, error=AudioError("outside-source", message))
