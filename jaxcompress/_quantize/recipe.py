# SPDX-License-Identifier: Apache-2.0
"""Recipes: ordered rules that say which site is stored and computed in which format."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Iterable
from typing import Any

from .. import formats
from .._core.patterns import matches
from .._core.sites import Site
from .._errors import RecipeError
from .backward import checked
from .quantizer import Quantizer

_INDIVISIBLE = ("error", "pad", "channel")
_KINDS = {str: ("pattern", "op", "source"), bool: ("frozen", "shared", "optional")}
_OPERANDS = {"weight": "channel", "activation": "token", "gradient": "token"}
_SPELLED = {str: "text", bool: "True or False"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do at the sites whose name a pattern matches.

    Args:
      pattern: glob on the site's name (`*` crosses `/`, `#k` is ignored, a leading `params/` and
        a trailing `/value` may be left out), or `re:` and a regular expression.
      weight: format name or `Quantizer` of the weight; a name means one scale per channel.
      activation: format name or `Quantizer` of the other operand; a name means per token.
      gradient: format name or `Quantizer` of what flows back into the site: its two backward
        products are computed in this format, and what they multiply it with in the same one
        (E4M3 with "float8_e5m2"). A name means one scale for the values that one result sums
        over. With `rounding="stochastic"` the function takes a `quantize_key=`.
        Without all three, the matching sites are left alone.
      op: only sites of this primitive, such as `"gather"`. A site of two activations (attention
        scores) or a custom call is touched only by a rule that names its `op`.
      source: only sites whose source line matches this glob, such as `"model.py:*"`.
      frozen: also sites whose weight is a constant that derives from no parameter.
      indivisible: what to do where a group does not fit: `"error"`, `"pad"` or `"channel"`.
      shared: the weight's format holds for every other use of the same array too (an embedding
        that is tied to the head).
      optional: it is no error if nothing matches.

    >>> Rule("*/mlp/*", weight="int4").weight.format.name
    'int4'
    """

    pattern: str
    weight: Quantizer | None = None
    activation: Quantizer | None = None
    _: dataclasses.KW_ONLY
    gradient: Quantizer | None = None
    op: str | None = None
    source: str | None = None
    frozen: bool = False
    indivisible: str | None = None
    shared: bool = False
    optional: bool = False

    def __post_init__(self):
        for kind, fields in _KINDS.items():
            for field in fields:
                value = getattr(self, field)
                if not isinstance(value, kind) and (value is not None or field == "pattern"):
                    raise RecipeError(
                        f"{field}={value!r} in a rule: expected {_SPELLED[kind]}, "
                        f"found {type(value).__name__}."
                    )
        if self.indivisible not in (None, *_INDIVISIBLE):
            raise RecipeError(
                f"indivisible={self.indivisible!r} in rule {self.pattern!r}: "
                f"expected one of {_INDIVISIBLE}."
            )
        matches(self.pattern, "")  # a broken regular expression fails here
        for field, granularity in _OPERANDS.items():
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, Quantizer):  # a block format brings its own blocks
                value = Quantizer(value, None if formats.get(value).block else granularity)
            if field == "gradient":
                value = checked(value, self.pattern)
            elif value.rounding == "stochastic":
                raise RecipeError(
                    f"{field} of rule {self.pattern!r}: only a gradient may be rounded at random. "
                    'Use rounding="half_even".'
                )
            if self.indivisible is not None:
                value = dataclasses.replace(value, indivisible=self.indivisible)
            object.__setattr__(self, field, value)

    @property
    def leaves_alone(self) -> bool:
        """Whether this rule excludes what it matches."""
        return self.weight is None and self.activation is None and self.gradient is None

    def matches(self, site: Site) -> bool:
        """Whether pattern, op and source fit the site."""
        if self.op is not None and self.op != site.op:
            return False
        if not matches(self.pattern, site.name):
            return False
        if self.source is None:
            return True
        line = site.source
        return any(fnmatch.fnmatch(form, self.source) for form in (line, line.split("/")[-1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; settings that are at their default are left out."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "pattern" or value != field.default:
                out[field.name] = value.to_dict() if isinstance(value, Quantizer) else value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        """Inverse of `to_dict`."""
        _known_keys(data, [f.name for f in dataclasses.fields(cls)], "rule", needs=("pattern",))
        data = dict(data)
        for field in _OPERANDS:
            if isinstance(data.get(field), dict):
                if "format" not in data[field]:
                    found = sorted(data[field])
                    raise RecipeError(f"a quantizer needs 'format'; found the keys {found}.")
                data[field] = Quantizer.from_dict(data[field])
        return cls(**data)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first that matches a site decides.

    A rule that matches nothing is an error, and so are two rules that give one array two formats.

    >>> recipe = Recipe([Rule("head/*", None), Rule("*", weight="int8")])
    >>> Recipe.from_json(recipe.to_json()) == recipe
    True
    """

    rules: tuple[Rule, ...]
    name: str = "custom"

    def __init__(self, rules: Iterable[Rule], name: str = "custom"):
        if isinstance(rules, Rule) or not isinstance(rules, Iterable):
            raise RecipeError(f"a recipe is a list of Rule, found {type(rules).__name__}.")
        if not isinstance(name, str):
            raise RecipeError(f"the name of a recipe is text, found {name!r}.")
        rules = tuple(rules)
        for rule in rules:
            if not isinstance(rule, Rule):
                raise RecipeError(f"a recipe is a list of Rule, found {type(rule).__name__}.")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "name", name)

    def skip(self, *patterns: str) -> Recipe:
        """This recipe with the sites that match these patterns left alone."""
        return Recipe([*(Rule(p, None) for p in patterns), *self.rules], self.name)

    def rule_for(self, site: Site) -> tuple[int, Rule] | None:
        """The first rule that matches, with its position."""
        return next(((i, r) for i, r in enumerate(self.rules) if r.matches(site)), None)

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text."""
        data = {"name": self.name, "rules": [rule.to_dict() for rule in self.rules]}
        return json.dumps(data, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Reads what `to_json` writes.

        Raises:
          RecipeError: not JSON, an unknown key (the nearest is named) or an unknown format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise RecipeError(f"the recipe is not valid JSON: {e}") from None
        _known_keys(data, ["name", "rules"], "recipe", needs=("rules",))
        if not isinstance(data["rules"], list):
            raise RecipeError(f"`rules` is a list, found {type(data['rules']).__name__}.")
        return cls([Rule.from_dict(rule) for rule in data["rules"]], data.get("name", "custom"))


def _known_keys(data: Any, known: list[str], what: str, needs: tuple[str, ...]) -> None:
    known = [k for k in known if k != "_"]
    if not isinstance(data, dict):
        raise RecipeError(f"a {what} is an object with {known}, found {type(data).__name__}.")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise RecipeError(
                f"unknown key {key!r} in a {what}: did you mean {near!r}? Known: {known}."
            )
    for key in needs:
        if key not in data:
            raise RecipeError(f"a {what} needs {key!r}; found the keys {sorted(data)}.")
