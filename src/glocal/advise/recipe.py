"""The recipe: which method runs at which sites, heads and noise levels, and what it was proven on.

``recipe.json`` has schema ``glocal.recipe/1``, sorted keys, at most 256 KiB. Rules are disjoint; what no rule covers
stays dense. Phases are noise levels or progress, never step numbers, so that another step count or scheduler maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glocal._errors import check_file
from glocal._files import write_atomic
from glocal.advise.identity import Mismatch, differences
from glocal.advise.methods import MethodSpec

if TYPE_CHECKING:
    from glocal.adapt.records import Site
    from glocal.advise.weights import Bucket

SCHEMA = "glocal.recipe/1"
LIMIT = 256 * 1024
Status = Literal["validated", "candidate", "dense"]


class RecipeError(ValueError):
    """A recipe that cannot be read or applied; the message names the field, the value and what is legal."""


@dataclass(frozen=True)
class Phase:
    """When a rule holds: a half-open range of a coordinate, `low` < x <= `high` for noise levels (they fall during a
    run), `low` <= x < `high` for progress and prefill lengths. coordinate "always" has no range.
    """

    coordinate: Literal["always", "sigma", "progress", "prefill"] = "always"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        legal = ("always", "sigma", "progress", "prefill")
        if self.coordinate not in legal:
            raise RecipeError(f"phase.coordinate={self.coordinate!r}; legal: {', '.join(legal)}.")
        if self.low > self.high:
            raise RecipeError(
                f"phase.low={self.low!r} lies above high={self.high!r}; low is the smaller, of sigma too."
            )

    def holds(self, *, sigma: float | None, progress: float | None, tokens: int | None = None) -> bool:
        """Whether the phase holds; an unknown coordinate does not hold."""
        if self.coordinate == "always":
            return True
        if self.coordinate == "sigma":
            # A model sees its noise level in float32: a level at an edge must stay on its side of it.
            return sigma is not None and self.low < sigma / (1 + 1e-6) <= self.high
        value = progress if self.coordinate == "progress" else tokens
        return value is not None and self.low <= value < self.high

    def to_json(self) -> str | dict[str, Any]:
        """As in `recipe.json`."""
        if self.coordinate == "always":
            return "always"
        names = ("min_tokens", "max_tokens") if self.coordinate == "prefill" else ("from", "to")
        ends = (self.high, self.low) if self.coordinate == "sigma" else (self.low, self.high)
        return {"coordinate": self.coordinate, names[0]: float(ends[0]), names[1]: float(ends[1])}

    @staticmethod
    def from_json(data: Any, where: str) -> Phase:
        """The inverse of `to_json`."""
        if data == "always":
            return Phase()
        if not isinstance(data, Mapping) or data.get("coordinate") not in ("sigma", "progress", "prefill"):
            raise RecipeError(
                f"{where}.phase={data!r}; legal: 'always' or {{coordinate: sigma | progress, from, to}} or "
                "{coordinate: prefill, min_tokens, max_tokens}."
            )
        names = ("min_tokens", "max_tokens") if data["coordinate"] == "prefill" else ("from", "to")
        try:
            first, last = float(data[names[0]]), float(data[names[1]])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"{where}.phase={data!r} needs numbers {names[0]} and {names[1]}.") from error
        low, high = (last, first) if data["coordinate"] == "sigma" else (first, last)
        if not low < high:
            raise RecipeError(f"{where}.phase={data!r} is empty: sigma falls from `from` to `to`, others rise.")
        return Phase(data["coordinate"], low, high)

    def meets(self, other: Phase) -> bool:
        """Whether both can hold at once (different coordinates always can)."""
        if self.coordinate != other.coordinate or self.coordinate == "always":
            return True
        return self.low < other.high and other.low < self.high


@dataclass(frozen=True)
class Expected:
    """What the maker of the recipe found for a rule; None where it was not measured."""

    kept: float | None = None
    mass: float | None = None
    error: float | None = None
    time_ratio: float | None = None


@dataclass(frozen=True)
class Rule:
    """At `site` calls of `component` in `layers` (inclusive ranges), `heads` and `phase`, run method `use`; "dense" is
    none.
    """

    use: str
    layers: tuple[tuple[int, int], ...]
    heads: tuple[int, ...] | Literal["all"] = "all"
    phase: Phase = field(default_factory=Phase)
    component: str = "transformer"
    site: Literal["self", "joint"] = "self"
    branch: Literal["both", "cond", "uncond"] = "both"
    expected: Expected = field(default_factory=Expected)

    def __post_init__(self) -> None:
        for name, legal in (("site", ("self", "joint")), ("branch", ("both", "cond", "uncond"))):
            if getattr(self, name) not in legal:
                raise RecipeError(f"rule.{name}={getattr(self, name)!r}; legal: {', '.join(legal)}.")
        if not all(isinstance(pair, tuple) and len(pair) == 2 and pair[0] <= pair[1] for pair in self.layers):
            raise RecipeError(f"rule.layers={self.layers!r}; legal: inclusive ranges, such as ((0, 5), (8, 8)).")

    def covers(self, layer: int) -> bool:
        """Whether `layer` lies in one of the ranges."""
        return any(a <= layer <= b for a, b in self.layers)

    def meets(self, other: Rule) -> bool:
        """Whether some call falls under both rules."""
        return (
            (self.component, self.site) == (other.component, other.site)
            and ("both" in (self.branch, other.branch) or self.branch == other.branch)
            and any(a <= d and c <= b for a, b in self.layers for c, d in other.layers)
            and (self.heads == "all" or other.heads == "all" or bool(set(self.heads) & set(other.heads)))
            and self.phase.meets(other.phase)
        )


@dataclass(frozen=True)
class Queries:
    """What happens to queries that are no media tokens."""

    text: Literal["dense", "as_media", "skip"] = "dense"
    registers: Literal["dense", "as_media", "skip"] = "dense"
    first_frame: Literal["dense", "as_media", "skip"] = "as_media"
    padding: Literal["dense", "as_media", "skip"] = "skip"


@dataclass(frozen=True)
class Fallback:
    """Where the recipe does not reach."""

    min_tokens: int = 1024
    unseen_canvas: Literal["dense", "run", "raise"] = "dense"
    mask: str = "dense"
    cross: str = "dense"
    decode: str = "dense"
    training: Literal["raise", "dense"] = "raise"
    mismatch: Literal["raise", "warn"] = "raise"
    dense_backend: str = "auto"


@dataclass(frozen=True)
class Recipe:
    """See the opening of this file. `host`, `workload`, `device`, `objective`, `evidence` are plain JSON records."""

    status: Status
    methods: Mapping[str, MethodSpec] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    host: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    queries: Queries = field(default_factory=Queries)
    fallback: Fallback = field(default_factory=Fallback)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in ("validated", "candidate", "dense"):
            raise RecipeError(f"status={self.status!r}; legal: validated, candidate, dense.")
        for number, rule in enumerate(self.rules):
            if rule.use != "dense" and rule.use not in self.methods:
                legal = ["dense", *self.methods]
                near = get_close_matches(rule.use, legal, n=1, cutoff=0.0)[0]
                raise RecipeError(f"rules[{number}].use={rule.use!r} names no method; nearest: {near!r}.")
            for other in range(number):
                if rule.meets(self.rules[other]):
                    raise RecipeError(
                        f"rules[{other}] and rules[{number}] overlap: layers {self.rules[other].layers} and "
                        f"{rule.layers}, heads {self.rules[other].heads} and {rule.heads}; rules must be disjoint."
                    )

    @property
    def id(self) -> str:
        """SHA-256 over everything but the evidence."""
        data = self._body()
        del data["evidence"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def _body(self) -> dict[str, Any]:
        rules = [
            {
                "component": r.component,
                "site": r.site,
                "layers": [list(pair) for pair in r.layers],
                "heads": r.heads if r.heads == "all" else list(r.heads),
                "phase": r.phase.to_json(),
                "branch": r.branch,
                "use": r.use,
                "expected": vars(r.expected),
            }
            for r in self.rules
        ]
        return {
            "schema": SCHEMA,
            "status": self.status,
            "methods": {name: m.to_json() for name, m in self.methods.items()},
            "rules": rules,
            "host": dict(self.host),
            "workload": dict(self.workload),
            "device": dict(self.device),
            "objective": dict(self.objective),
            "queries": vars(self.queries),
            "fallback": vars(self.fallback),
            "evidence": dict(self.evidence),
        }

    def dumps(self) -> str:
        """The text of `recipe.json`; RecipeError above 256 KiB."""
        text = json.dumps({**self._body(), "id": self.id}, sort_keys=True, indent=1) + "\n"
        if len(text.encode()) > LIMIT:
            raise RecipeError(f"recipe.json would have {len(text.encode())} bytes; the limit is {LIMIT}.")
        return text

    def save(self, path: str | Path) -> None:
        """Write `recipe.json`, whole or not at all, with the files of its static masks beside it."""
        folder = Path(path).parent
        for method in self.methods.values():
            if method.masks is not None and Path(method.masks).resolve().parent != folder.resolve():
                write_atomic(folder / Path(method.masks).name, Path(method.masks).read_bytes())
        write_atomic(Path(path), self.dumps())

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a recipe file; RecipeError says what is wrong with it, FileNotFoundError that it is not there."""
        file = Path(path)
        check_file("recipe", file)
        found = Recipe.loads(file.read_text(), str(path))
        beside = {
            n: m if m.masks is None else replace(m, masks=str(file.resolve().parent / m.masks))
            for n, m in found.methods.items()
        }
        return replace(found, methods=beside)

    @staticmethod
    def loads(text: str, name: str = "recipe") -> Recipe:
        """Read the text of a recipe."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{name} is not JSON: {error}.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise RecipeError(f"{name}: schema={found!r}; this version reads {SCHEMA!r}.")
        legal = [*Recipe.__dataclass_fields__, "schema", "id"]
        for key in data:
            if key not in legal:
                near = get_close_matches(key, legal, n=1, cutoff=0.0)[0]
                raise RecipeError(f"{name}: field {key!r} is unknown; nearest: {near!r}.")
        try:
            methods = {n: MethodSpec.from_json(m) for n, m in data.get("methods", {}).items()}
        except (ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"{name}: {error}") from error
        recipe = Recipe(
            status=data.get("status", ""),
            methods=methods,
            rules=tuple(_rule(r, f"rules[{i}]") for i, r in enumerate(data.get("rules", []))),
            host=data.get("host", {}),
            workload=data.get("workload", {}),
            device=data.get("device", {}),
            objective=data.get("objective", {}),
            queries=_record(Queries, data.get("queries", {}), "queries"),
            fallback=_record(Fallback, data.get("fallback", {}), "fallback"),
            evidence=data.get("evidence", {}),
        )
        if data.get("id") != recipe.id:
            raise RecipeError(
                f"{name}: id={data.get('id')!r} does not match its content ({recipe.id[:12]}...); it was edited by "
                "hand. Run glocal validate on the edited rules, or restore the file."
            )
        return recipe

    def method_at(
        self,
        layer: int,
        head: int,
        *,
        component: str,
        kind: str,
        branch: str,
        sigma: float | None,
        progress: float | None,
        tokens: int | None = None,
    ) -> str:
        """Method id for one head of one call, "dense" where no rule holds. tokens: keys of a prefill."""
        for rule in self.rules:
            if (
                rule.component == component
                and rule.site == kind
                and rule.covers(layer)
                and (rule.heads == "all" or head in rule.heads)
                and (rule.branch == "both" or rule.branch == branch)
                and rule.phase.holds(sigma=sigma, progress=progress, tokens=tokens)
            ):
                return rule.use
        return "dense"

    def method_in(self, site: Site, head: int, bucket: Bucket, tokens: int = 1) -> str:
        """What one head of a site runs in a step range, with conditions; tokens: keys of a prefill."""
        return self.method_at(
            site.layer,
            head,
            component=site.component,
            kind=site.kind,
            branch="cond",
            sigma=bucket.high if bucket.coordinate == "sigma" else None,
            progress=None,
            tokens=tokens if bucket.coordinate == "prefill" else None,
        )

    def check(self, model: Any) -> list[Mismatch]:
        """Where `model` differs from the one this recipe was proven on: class, configuration, weights, dtype.

        Empty if nothing differs, or if the recipe names no components. Raises ValueError for a model without a host.
        """
        return differences(self.host, model)

    def with_evidence(self, **evidence: Any) -> Recipe:
        """The same recipe with more evidence; its id stays."""
        return replace(self, evidence={**self.evidence, **evidence})


def _rule(data: Any, where: str) -> Rule:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}={data!r} must be a record.")
    legal = [*Rule.__dataclass_fields__]
    for key in data:
        if key not in legal:
            raise RecipeError(
                f"{where}.{key} is unknown; nearest: {get_close_matches(key, legal, n=1, cutoff=0.0)[0]!r}."
            )
    try:
        layers = tuple((int(a), int(b)) for a, b in data["layers"])
        heads = "all" if data.get("heads", "all") == "all" else tuple(int(h) for h in data["heads"])
        use = data["use"]
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{where}: needs use, layers as [[first, last]] and heads as a list or 'all'; got {data!r}."
        ) from error
    for name, words in (("branch", ("both", "cond", "uncond")), ("site", ("self", "joint"))):
        if data.get(name, words[0]) not in words:
            raise RecipeError(f"{where}.{name}={data[name]!r}; legal: {', '.join(words)}.")
    return Rule(
        use,
        layers,
        heads,  # type: ignore[arg-type]
        Phase.from_json(data.get("phase", "always"), where),
        data.get("component", "transformer"),
        data.get("site", "self"),
        data.get("branch", "both"),
        _record(Expected, data.get("expected", {}), f"{where}.expected"),
    )


def _record(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    legal: Sequence[str] = list(kind.__dataclass_fields__)
    for key in data:
        if key not in legal:
            near = get_close_matches(key, legal, n=1, cutoff=0.0)[0]
            raise RecipeError(f"{where}.{key} is unknown; legal: {', '.join(legal)}; nearest: {near!r}.")
    return kind(**data)
