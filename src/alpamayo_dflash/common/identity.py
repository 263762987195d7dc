"""What an artefact is made from, told by the content that acts: the files that are read, wherever they lie.

Settings and records that hold such hashes say `identity: 2`. Those made before lack the key; in them a
model's hash is over every file of its folder, so that a README beside the weights made it another one.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import IDENTITY, file_hash, folder_hash
from alpamayo_dflash.common.ranks import require_same


@dataclass(frozen=True)
class Fingerprint:
    """Who a model or a set of data is.

    Attributes:
        hash: SHA-256 over what is read of it, in hex.
        before: its hash by the rule of before, computed when first asked for.
        exact: by that rule too another hash is another one: it was not over files that nobody reads, or a
            place where something else may lie by now.
    """

    hash: str
    before: Callable[[], str]
    exact: bool = False

    def under(self, rule: Mapping[str, Any], where: Path) -> str:
        """Its hash by the rule that a record names, or by that of before where it names none.

        Raises:
            ValueError: the rule is not known here; `where` names the record's file.
        """
        known = rule.get("identity", 1)
        if known not in (1, IDENTITY):
            raise ValueError(f"{where}: says identity {known!r}; this version knows 1 and {IDENTITY}")
        return self.hash if known == IDENTITY else self.before()


def identity_of(files: Mapping[str, Path], folder: Path) -> Fingerprint:
    """The identity of a model.

    Args:
        files: what is read of it, by the part that each plays; their places do not count.
        folder: all of which counted before.
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{file_hash(path)}\n".encode())
    return Fingerprint(digest.hexdigest(), functools.cache(lambda: folder_hash(folder)))


def changed_identity(identity: Fingerprint, change: str) -> Fingerprint:
    """The identity of what is made from a model as it is read.

    Args:
        identity: the model's.
        change: what is made of it, in words that stay the same.
    """

    def changed(found: str) -> str:
        return hashlib.sha256(f"{found}\0{change}\n".encode()).hexdigest()

    return Fingerprint(changed(identity.hash), lambda: changed(identity.before()), identity.exact)


def is_made_from(
    name: str, recorded: str, rule: Mapping[str, Any], identity: Fingerprint, where: Path
) -> bool:
    """Whether a recorded hash is that of a model, by the rule that it was recorded by.

    By the rule of before, a hash that differs may mean a file that nobody reads: that passes, and is printed.

    Args:
        name: the model's part, for the message.
        recorded: the hash.
        rule: the object that says `identity`, where it was recorded by a rule since.
        identity: the model's now.
        where: the file that the hash stands in, for the message.

    Raises:
        ValueError: it was recorded by a rule that is not known here.
    """
    now = identity.under(rule, where)
    if recorded == now or rule.get("identity") == IDENTITY or identity.exact:
        return recorded == now
    print(
        f"{where}: made when every file of a folder counted. Its {name} was {recorded[:12]} then and is "
        f"{now[:12]} by that rule now; whether a file that is read has changed cannot be told. All else "
        "agrees, so this run goes on",
        file=sys.stderr,
    )
    return True


def agreed(
    settings: Mapping[str, Any], found: Mapping[Path, Mapping[str, Any]], models: Mapping[str, Fingerprint]
) -> dict[str, Any]:
    """The settings that a folder's parts are made with: those of its first part, where there is one.

    Args:
        settings: this run's, with the models' hashes and the present rule.
        found: the settings in each file that is there.
        models: by the settings that hold their hashes.

    Returns:
        `settings`, or the same by the rule of before.

    Raises:
        ValueError: parts of other settings; the message names the first that differs.
    """
    chosen = dict(settings)
    for path, theirs in found.items():
        if "identity" not in theirs and "identity" in chosen:
            others = {key: value for key, value in settings.items() if key not in (*models, "identity")}
            require_same({key: theirs[key] for key in theirs if key not in models}, others, path)
            for name, identity in models.items():
                is_made_from(name, str(theirs.get(name)), theirs, identity, path)
            chosen = dict(theirs)
        require_same(theirs, chosen, path)
    return chosen
