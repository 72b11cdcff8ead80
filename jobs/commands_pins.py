"""Commands for pins, snapshots that somebody trains on, and for what no snapshot needs."""

from typing import Annotated

import typer

from .arguments import parse_versions
from .console import JsonOption, RootArgument, app, print_json, say

NameArgument = Annotated[str, typer.Argument(help="The pin's name.")]


@app.command()
def pin(
    root: RootArgument,
    name: NameArgument,
    at: Annotated[
        list[str] | None, typer.Option(metavar="STREAM=VERSION", help="Pin this version of a stream, not the newest.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Give the newest snapshot of all streams a name to train on: TokenDataset(..., pin=NAME). It stays readable."""
    from ..storage.pins import pin as pin_snapshot
    from ..storage.root import Root

    versions = pin_snapshot(Root(root), name, parse_versions(at))
    if json_:
        print_json({"pin": name, "versions": versions})
    else:
        say(f"Pinned as {name}: {_told(versions)}.")


@app.command()
def unpin(root: RootArgument, name: NameArgument) -> None:
    """Take a pin away; the snapshot may then be vacuumed."""
    from ..storage.pins import unpin as unpin_snapshot
    from ..storage.root import Root

    unpin_snapshot(Root(root), name)
    say(f"There is no pin {name} any more.")


@app.command()
def pins(root: RootArgument, json_: JsonOption = False) -> None:
    """List the pins of a dataset and the versions that they name."""
    from ..storage.pins import list_pins, read_pin
    from ..storage.root import Root

    place = Root(root)
    found = {
        name: {table: pinned.version for table, pinned in read_pin(place, name).items()} for name in list_pins(place)
    }
    if json_:
        print_json(found)
        return
    for name, versions in found.items():
        print(f"{name}: {_told(versions)}")
    if not found:
        say(f"There are no pins in {place}.")


@app.command()
def vacuum(
    root: RootArgument,
    older_than_h: Annotated[
        float, typer.Option("--older-than-hours", metavar="HOURS", help="Leave files younger than this.")
    ] = 48.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
    json_: JsonOption = False,
) -> None:
    """Remove shard files that neither the newest nor a pinned snapshot needs, such as those of killed runs."""
    from ..storage.root import Root
    from ..storage.vacuum import vacuum as remove_leftovers

    place = Root(root)
    found = remove_leftovers(place, older_than_h=older_than_h, dry_run=dry_run)
    size_bytes = sum(file.size_bytes for file in found)
    if json_:
        print_json({"files": [file.path for file in found], "size_bytes": size_bytes, "removed": not dry_run})
        return
    for file in found:
        print(file.path)
    verb = "Would remove" if dry_run else "Removed"
    say(f"{verb} {len(found)} file(s), {size_bytes / 1e6:,.1f} MB.")


def _told(versions: dict[str, int]) -> str:
    return ", ".join(f"{table} at version {version}" for table, version in versions.items())
