"""Pre-training examples: a window of a document, and reasoning traces that branch off from positions in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rpt_jax.config import Experiment
from rpt_jax.prompts.builder import PromptBuilder
from rpt_jax.prompts.traces import TraceWriter
from rpt_jax.registry import TRACE_WRITERS
from rpt_jax.tokenizers.tokenizer import Tokenizer


class _Trace(NamedTuple):
    """A response with the prompt that precedes it.

    Attributes:
      prompt: token ids of the whole prompt, template included.
      response: token ids of the response.
      given: number of leading response tokens that are excluded from the loss.
    """

    prompt: list[int]
    response: list[int]
    given: int


class ExampleMaker:
    """Builds pre-training examples: the tokens of a window, and traces that continue prefixes of it, packed into rows.

    The window is placed in the prompt template, and every trace follows the prompt for its position, exactly as in
    sampling, except that contexts longer than `prompt.max_tokens` are not cut.
    """

    def __init__(
        self, experiment: Experiment, tokenizer: Tokenizer, windows: Sequence[np.ndarray], boxable_V: np.ndarray
    ):
        """
        Args:
          experiment: the config.
          tokenizer: encodes the template and the traces.
          windows: token ids of each window, at most `data.max_document_tokens`; read lazily.
          boxable_V: bool, the tokens that a box can hold; no trace predicts another.
        """
        self._config = experiment.pretrain
        self._max_document_tokens = experiment.data.max_document_tokens
        self._min_context = experiment.data.min_context
        self._tokenizer = tokenizer
        self._prompt = PromptBuilder(experiment.prompt, tokenizer)
        self._windows = windows
        self._boxable_V = boxable_V

    def make(self, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the example of one window.

        Args:
          window: index into `windows`.
          rng: draws the positions of the traces and the numbers of the drills.

        Returns:
          `document`: int32, the index.
          `inputs`, `targets`: int32 [S], the window after the beginning of the template, for next-token prediction.
          `mask`: bool [S], the targets that count in the loss.
          `trace_inputs`, `trace_targets`, `trace_mask`: [K, T], K rows of T tokens of packed traces, template end included.
          `trace_segment`: int32 [K, T], which trace of its row a token belongs to; 0 = padding.
          `trace_prefix`: int32 [K, T], length of the prefix of `inputs` that the token's trace continues.
          `trace_position`: int32 [K, T], position of the token in the sequence of prefix and trace.
        """
        before = self._prompt.before
        after = self._prompt.after
        ids = self._windows[window].tolist()

        # The window itself, as inputs and shifted targets.
        size = len(before) - 1 + self._max_document_tokens
        tokens = np.array([*before, *ids, self._tokenizer.eos_id], np.int32)[: size + 1]
        padded = np.pad(tokens, (0, size + 1 - len(tokens)))
        index = np.arange(size)
        mask = (index >= len(before) - 1) & (index < len(tokens) - 1)

        # Traces at positions of the window, then drills, which do not need the window.
        max_trace_tokens = self._config.row_tokens + 1 - max(1, len(after))
        writer = TRACE_WRITERS[self._config.traces].function(self._tokenizer, ids, self._config, max_trace_tokens)
        positions = [p for p in self._draw_positions(len(ids), writer, rng) if self._boxable_V[ids[p]]]
        traces = [_Trace(prompt=[*before, *ids[:p], *after], response=writer.write(p, rng), given=0) for p in positions]
        drills = [_Trace(prompt=after, response=response, given=given) for response, given in writer.drills(rng)]

        window_arrays = {
            "document": np.int32(window),
            "inputs": padded[:-1],
            "targets": padded[1:],
            "mask": mask,
        }
        return window_arrays | self._pack([*traces, *drills])

    def _draw_positions(self, num_tokens: int, writer: TraceWriter, rng: np.random.Generator) -> list[int]:
        """Draw the positions of the traces: a fraction among the writer's preferred ones, the others uniformly."""
        last = num_tokens - 1
        first = min(self._min_context, last)
        count = self._config.traces_per_window
        positions = rng.integers(first, last + 1, size=count)
        preferred = [p for p in writer.preferred_positions if first <= p <= last]
        if preferred:
            num_preferred = round(count * writer.preferred_fraction)
            positions[:num_preferred] = rng.choice(preferred, size=num_preferred)
        return [int(p) for p in rng.permutation(positions)]

    def _pack(self, traces: Sequence[_Trace]) -> dict[str, np.ndarray]:
        """Put each trace into the first row with enough room; traces that fit into no row are dropped.

        The part of a prompt that is a prefix of the window is not repeated: the model attends to the window instead.
        """
        num_rows = self._config.rows_per_window
        row_tokens = self._config.row_tokens
        names = ("inputs", "targets", "mask", "segment", "prefix", "position")
        rows = {name: np.zeros((num_rows, row_tokens), bool if name == "mask" else np.int32) for name in names}
        used = np.zeros(num_rows, int)
        for segment, trace in enumerate(traces, start=1):
            # If the template ends with the context, the last context token is run again to predict the first of the trace.
            prefix = max(0, len(trace.prompt) - max(1, len(self._prompt.after)))
            tokens = [*trace.prompt[prefix:], *trace.response]
            size = len(tokens) - 1
            fitting = np.flatnonzero(used + size <= row_tokens)
            if not len(fitting):
                continue
            row = fitting[0]
            columns = slice(used[row], used[row] + size)
            used[row] += size
            rows["inputs"][row, columns] = tokens[:-1]
            rows["targets"][row, columns] = tokens[1:]
            rows["mask"][row, columns] = np.arange(size) >= size - len(trace.response) + trace.given
            rows["segment"][row, columns] = segment
            rows["prefix"][row, columns] = prefix
            rows["position"][row, columns] = prefix + np.arange(size)
        return {f"trace_{name}": array for name, array in rows.items()}
