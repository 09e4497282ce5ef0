"""What happened to each tensor of a network when weights were put into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from nnssl.parts import DECODER, Part


@dataclass
class PartReport:
    """One part of the network. Tensors are counted once each, whatever the number of their names.

    Attributes:
        part: which.
        loaded, adapted, random: numbers of tensors taken as they are, taken after a change of shape, left at their
            random initialisation.
        parameters: numbers in all tensors of the part.
        parameters_loaded: of these, numbers loaded or adapted.
        reasons: why tensors were left random, with the number of tensors each.
    """

    part: Part
    loaded: int = 0
    adapted: int = 0
    random: int = 0
    parameters: int = 0
    parameters_loaded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return self.loaded + self.adapted + self.random

    @property
    def percent(self) -> float:
        """Share of the part's parameters that were loaded, in %."""
        return 100.0 * self.parameters_loaded / self.parameters if self.parameters else 0.0


@dataclass
class TransferReport:
    """The account of one transfer; ``str()`` is the table that is printed, :meth:`to_dict` what is saved.

    Attributes:
        source: where the weights came from, for the reader.
        parts: the parts in the order of computation.
        notes: what a person should know besides.
        adaptations: one line for each kind of change that was made to the weights.
        left_out: pretrained parts that were left random on purpose, and why.
    """

    source: str
    parts: list[PartReport]
    notes: list[str] = field(default_factory=list)
    adaptations: list[str] = field(default_factory=list)
    left_out: dict[Part, str] = field(default_factory=dict)

    def part(self, name: str) -> PartReport:
        """The report of one part. Raises KeyError where the network has no such part."""
        for row in self.parts:
            if row.part == name:
                return row
        raise KeyError(name)

    @property
    def total(self) -> PartReport:
        """All parts together."""
        return PartReport(
            Part("whole network"),
            loaded=sum(row.loaded for row in self.parts),
            adapted=sum(row.adapted for row in self.parts),
            random=sum(row.random for row in self.parts),
            parameters=sum(row.parameters for row in self.parts),
            parameters_loaded=sum(row.parameters_loaded for row in self.parts),
            reasons=sum((row.reasons for row in self.parts), Counter()),
        )

    @property
    def random_decoder(self) -> list[Part]:
        """The decoder stages in which anything was left random."""
        return [row.part for row in self.parts if row.part.kind == DECODER and row.random]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = {str(row.part): row for row in [*self.parts, self.total]}
        return {
            "source": self.source,
            "parts": {
                part: {**asdict(row), "part": part, "reasons": dict(row.reasons), "percent": round(row.percent, 2)}
                for part, row in rows.items()
            },
            "adaptations": list(self.adaptations),
            "left_out": {str(part): why for part, why in self.left_out.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = f"{'part':<18}{'loaded':>8}{'adapted':>9}{'random':>8}{'of tensors':>12}{'% of parameters':>17}"
        lines = [f"Transfer report: {self.source}", head, "-" * len(head)]
        lines += [
            f"{row.part:<18}{row.loaded:>8}{row.adapted:>9}{row.random:>8}{row.tensors:>12}{row.percent:>17.1f}"
            for row in [*self.parts, self.total]
        ]
        for row in self.parts:
            if row.part not in self.left_out:
                lines += [f"  {row.part}: {count} left random: {reason}" for reason, count in row.reasons.items()]
        for why in dict.fromkeys(self.left_out.values()):
            parts = ", ".join(part for part, reason in self.left_out.items() if reason == why)
            lines.append(
                f"  left out on purpose: {parts} ({why}); to take all that was pretrained: nnssl_plan --parts all"
            )
        lines += [f"  adapted: {text}" for text in self.adaptations]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
