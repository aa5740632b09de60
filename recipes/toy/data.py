"""Prompts without end, made on the device that trains: a batch costs a few milliseconds and no disk.

A sequence is ``<bos>`` and then demonstrations. *Few-shot* sequences have one task, which nothing
names: it has to be inferred from the pairs so far. *Named* sequences have another task in every
demonstration and name it before the separator. The loss falls on the answers alone, so one sequence
trains every number of shots at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import torch
import torch.nn.functional as F
from torch import Tensor

# What stands before x, between x and y, and after y, as in tvlens' templates of these names.
TEMPLATES = {
    "example": (("example", ":"), ("->",), ("\n",)),
    "arrow": ((), ("→",), ("\n",)),
    "qa": (("Q", ":"), ("\n", "A", ":"), ("\n", "\n")),
}
SHARES = (0.7, 0.15, 0.15)
_N_LETTERS, _MAX_LIST, _MAX_X = 26, 4, 7
_PRE, _NAME, _MID, _POST = 2, 2, 3, 2
_SLOTS = _PRE + _MAX_X + _NAME + _MID + 1 + _POST
_AT_Y = _PRE + _MAX_X + _NAME + _MID


@dataclass(frozen=True)
class Batch:
    """Sequences, and where their answers are.

    Attributes:
        tokens: (sequence, position), padded on the right.
        answers: (sequence, demonstration): the answers, -1 where the sequence was cut before.
        places: (sequence, demonstration): the position before each answer.
        task: (sequence, demonstration): number of the task.
        few_shot: (sequence,): False where the tasks are named.
        last: (sequence,): the position before one answer: a late one of a few-shot sequence, the first
            of a named one.
        lone: (sequence, position): another query of that answer's task, with nothing before it.
        lone_last: (sequence,): its last position.
        lone_answer: (sequence,): its answer.
    """

    tokens: Tensor
    answers: Tensor
    places: Tensor
    task: Tensor
    few_shot: Tensor
    last: Tensor
    lone: Tensor
    lone_last: Tensor
    lone_answer: Tensor


class Stream:
    """Draws batches; the same seed on the same kind of device gives the same ones."""

    def __init__(
        self,
        tables: Path,
        *,
        seed: int,
        device: str,
        shots: int,
        width: int,
        named: float,
        only: tuple[str, ...] = (),
    ) -> None:
        self.tables = json.loads(tables.read_text(encoding="utf-8"))
        self.ids = {word: i for i, word in enumerate(self.tables["vocabulary"])}
        self.shots, self.width, self.named, self.device = shots, width, named, device
        self.random = torch.Generator(device).manual_seed(seed)
        self.tasks = (*self.tables["mappings"], *self.tables["lists"])
        self.n_maps = len(self.tables["mappings"])
        out = set(self.tables["held_out_instances"])
        taught = [i for i, t in enumerate(self.tasks) if not only or t in only]
        self.taught = self._tensor(taught)
        self.few_shot_tasks = self._tensor([i for i in taught if self.tasks[i] not in out])
        self._read_mappings()
        self._read_lists()
        self._read_templates()

    def batch(self, size: int) -> Batch:
        """Draw sequences."""
        rows = self.shots + 1
        few_shot = self._rand(size) >= self.named
        one = self.few_shot_tasks[self._below(len(self.few_shot_tasks), size, 1)].expand(size, rows)
        any_task = self.taught[self._below(len(self.taught), size, rows)]
        # Where tasks are named, the lone query has the first demonstration's.
        any_task = torch.cat([any_task[:, :-1], any_task[:, :1]], dim=1)
        task = torch.where(few_shot[:, None], one, any_task)
        x, answer = self._pairs(task, few_shot)
        style = torch.multinomial(self.shares.expand(size, -1), 1, generator=self.random)
        names = self.names[task]
        names[:, -1] = -1
        slots = torch.cat(
            [
                self.pre[style].expand(-1, rows, -1),
                x,
                torch.where(few_shot[:, None, None], -1, names),
                self.mid[style].expand(-1, rows, -1),
                answer[..., None],
                self.post[style].expand(-1, rows, -1),
            ],
            dim=-1,
        )
        tokens, places = self._packed(slots[:, :-1], self.width)
        lone, lone_places = self._packed(slots[:, -1:], 1 + _SLOTS)
        whole = places < self.width - 1
        late = whole.float() * torch.arange(1, rows, device=self.device) ** 2
        drawn = torch.multinomial(late, 1, generator=self.random) * few_shot[:, None]
        return Batch(
            tokens,
            answer[:, :-1].where(whole, -1),
            places,
            task[:, :-1],
            few_shot,
            places.gather(1, drawn)[:, 0],
            lone,
            lone_places[:, 0],
            answer[:, -1],
        )

    def _pairs(self, task: Tensor, few_shot: Tensor) -> tuple[Tensor, Tensor]:
        """Draw an input and its answer for every demonstration; no input comes twice in a few-shot one."""
        size, rows = task.shape
        of_map = task.clamp(max=self.n_maps - 1)
        pool = self.shown[of_map[:, 0]]
        order = (self._rand(*pool.shape) + 2.0 * (pool < 0)).argsort(-1)[:, :rows]
        distinct = pool.gather(1, order)
        any_item = (self._rand(size, rows) * self.n_items[of_map]).long()
        item = torch.where(few_shot[:, None], distinct, any_item)
        x_map, y_map = self.inputs[of_map, item], self.outputs[of_map, item]
        letters, x_list = self._lists(size, rows)
        y_list = self._list_answers((task - self.n_maps).clamp(min=0), letters)
        is_list = task >= self.n_maps
        alone = torch.full_like(x_list, -1)
        alone[..., 0] = x_map
        return torch.where(is_list[..., None], x_list, alone), torch.where(is_list, y_list, y_map)

    def _lists(self, size: int, rows: int) -> tuple[Tensor, Tensor]:
        """Draw lists that are not held out: letters (-1 where there is none) and tokens with commas."""
        length = self._below(len(self.pools), size, rows)
        at = (self._rand(size, rows) * self.pool_sizes[length]).long()
        letters = torch.stack([pool[at.clamp(max=len(pool) - 1)] for pool in self.pools])
        letters = letters.gather(0, length[None, ..., None].expand(1, -1, -1, _MAX_LIST))[0].long()
        tokens = torch.full((size, rows, _MAX_X), -1, device=self.device)
        tokens[..., ::2] = torch.where(letters >= 0, self.lower[letters.clamp(min=0)], -1)
        tokens[..., 1::2] = torch.where(letters[..., 1:] >= 0, self.ids[","], -1)
        return letters, tokens

    def _list_answers(self, task: Tensor, letters: Tensor) -> Tensor:
        length = (letters >= 0).sum(-1)
        last = letters.gather(-1, length[..., None] - 1)[..., 0]
        least = torch.where(letters >= 0, letters, _N_LETTERS).amin(-1)
        picked = {
            "first": letters[..., 0],
            "second": letters[..., 1],
            "last": last,
            "min": least,
            "max": letters.amax(-1),
        }
        after = {
            "same": self.lower,
            "upper": self.upper,
            "next": self.lower.roll(-1),
        }
        answers = [
            self.digits[length] if rule == "length" else after[to][picked[rule]]
            for rule, to in self.tables["lists"].values()
        ]
        return torch.stack(answers).gather(0, task[None])[0]

    def _packed(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Close gaps, put BOS before, cut at the width; also say where the answers are awaited."""
        flat, real = slots.flatten(1), slots.flatten(1) >= 0
        place = torch.where(real, real.cumsum(1), width).clamp(max=width)
        empty = torch.full((len(flat), width + 1), self.ids["<pad>"], device=self.device)
        tokens = empty.scatter(1, place, flat)[:, :width]
        tokens[:, 0] = self.ids["<bos>"]
        return tokens, place.view(slots.shape)[..., _AT_Y].clamp(max=width) - 1

    def _read_mappings(self) -> None:
        maps, held = self.tables["mappings"].values(), self.tables["held_out_items"].values()
        most = max(map(len, maps))

        def padded(rows: list[list[int]]) -> Tensor:
            return self._tensor([row + [-1] * (most - len(row)) for row in rows])

        self.inputs = padded([[self.ids[x] for x in pairs] for pairs in maps])
        self.outputs = padded([[self.ids[y] for y in pairs.values()] for pairs in maps])
        self.n_items = self._tensor([len(pairs) for pairs in maps])
        self.shown = padded(
            [
                [i for i, x in enumerate(pairs) if x not in out]
                for pairs, out in zip(maps, held, strict=True)
            ]
        )

    def _read_lists(self) -> None:
        out = [text.split(",") for text in self.tables["held_out_lists"]]
        self.pools = []
        for length in range(2, _MAX_LIST + 1):
            place = _N_LETTERS ** torch.arange(length)
            rows = torch.cartesian_prod(*[torch.arange(_N_LETTERS)] * length)
            held = [[ord(x) - ord("a") for x in row] for row in out if len(row) == length]
            known = torch.isin((rows * place).sum(1), (torch.tensor(held) * place).sum(1))
            twice = (rows[:, :, None] == rows[:, None]).sum((1, 2)) > length
            pool = F.pad(rows[~known & ~twice], (0, _MAX_LIST - length), value=-1)
            self.pools.append(pool.to(self.device, torch.int8))
        self.pool_sizes = self._tensor([len(pool) for pool in self.pools])
        self.lower = self._tensor([self.ids[letter] for letter in ascii_lowercase])
        self.upper = self._tensor([self.ids[letter.upper()] for letter in ascii_lowercase])
        self.digits = self._tensor([self.ids[str(i)] for i in range(_MAX_LIST + 1)])

    def _read_templates(self) -> None:
        def padded(words: tuple[str, ...] | list[str], slots: int) -> list[int]:
            return [self.ids[word] for word in words] + [-1] * (slots - len(words))

        templates = TEMPLATES.values()
        self.pre = self._tensor([padded(pre, _PRE) for pre, _, _ in templates])
        self.mid = self._tensor([padded(mid, _MID) for _, mid, _ in templates])
        self.post = self._tensor([padded(post, _POST) for _, _, post in templates])
        names = self.tables["names"]
        self.names = self._tensor([padded(names[task], _NAME) for task in self.tasks])
        self.shares = torch.tensor(SHARES, device=self.device)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, device=self.device)

    def _below(self, n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=self.random, device=self.device)
