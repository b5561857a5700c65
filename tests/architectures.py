"""Compare losses, gradients and answers of every architecture in transformers with those of the plain model.

`make architectures` does so with a tiny random model of each class and writes `tests/architectures.json`; `make test`
does so for some of them.
"""

import tempfile
import traceback
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stages.data.examples import Example
from stages.data.files import read_json, write_json
from stages.download_model import save
from stages.engine.batches import partition_by_cost
from stages.engine.decoding import METHODS, choose_method, generation_settings
from stages.engine.loss import losses_by_example, summed_loss
from stages.engine.models import load_model
from stages.engine.probe import choose_batches, has_dropout
from stages.runtime.errors import UserError
from stages.runtime.terminal import progress
from tests.clone import make_tokenizer
from tests.conftest import example
from tests.textbook import textbook_answer, textbook_losses
from tests.tiny_models import NOT_BUILT, tiny_model

RESULTS = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-3  # nats/token; for the gradient, relative to its norm
# Tokens of prompts and responses. Sliding windows of tiny models have 8 tokens; examples are shorter, or longer.
LENGTHS = {"short": [(4, 3), (5, 2), (2, 4), (4, 1), (6, 1)], "long": [(20, 9), (23, 3), (9, 14), (21, 1), (4, 6)]}
NEW_TOKENS = 12
WHERE = "model_name: 'tiny'"


@dataclass(frozen=True)
class Outcome:
    """How models of an architecture are computed, or why not.

    training, answers: kind of batch and method of generation, for short and for long examples.
    problem: why it was not built or rejected.
    wrong: differences from the plain model, or an exception that is not a `UserError`.
    """

    training: Sequence[str] = ()
    answers: Sequence[str] = ()
    problem: str = ""
    wrong: str = ""


def main() -> None:
    transformers.logging.set_verbosity_error()
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    outcomes = {name: try_architecture(name) for name in progress(names, "compare", "architecture")}
    write_json(RESULTS, {name: asdict(outcome) for name, outcome in outcomes.items()})
    print(table(read_results()))
    if wrong := {name: outcome.wrong for name, outcome in outcomes.items() if outcome.wrong}:
        raise SystemExit("\n".join(f"{name}: {difference}" for name, difference in wrong.items()))


def read_results() -> dict[str, Outcome]:
    return {name: Outcome(**outcome) for name, outcome in read_json(RESULTS).items()}


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown tables: the model types that are computed in the same way, and those with a problem."""
    groups: dict[tuple[str, str], list[str]] = {}
    problems = []
    for name, outcome in outcomes.items():
        if outcome.problem or outcome.wrong:
            problems.append(f"| {name} | {outcome.problem or 'wrong: ' + outcome.wrong} |")
        else:
            key = " / ".join(dict.fromkeys(outcome.training)), " / ".join(dict.fromkeys(outcome.answers))
            groups.setdefault(key, []).append(name)
    lines = ["| training | answers | number | model types |", "|---|---|---:|---|"]
    for (training, answers), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {training} | {answers} | {len(names)} | {', '.join(names)} |")
    return "\n".join([*lines, "", "| model type | problem |", "|---|---|", *problems])


def try_architecture(name: str) -> Outcome:
    """Take a tiny model of an architecture through `download_model`, and compare what the engine computes with it."""
    if name in NOT_BUILT:
        return Outcome(problem=f"not built: {NOT_BUILT[name]}")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        try:
            make_tokenizer(list(special.values()), **special).save_pretrained("tiny")
            tiny_model(name).save_pretrained("tiny")
            save(Path("tiny"), {"model_name": "tiny", "revision": None})
            return compare(load_model(Path("models/base"), torch.device("cpu")))
        except UserError as error:
            return Outcome(problem=f"rejected: {str(error).removeprefix(WHERE).lstrip(': ')}")
        except Exception as error:
            traceback.print_exception(error)
            return Outcome(wrong=f"{type(error).__name__}: {error}")


def compare(model: PreTrainedModel) -> Outcome:
    """Compare losses, gradients and answers with those of the plain model, one example or prompt at a time."""
    training, answers, wrong = [], [], []
    for kind, lengths in LENGTHS.items():
        examples = make_examples(lengths)
        num_supervised = sum(one.num_supervised for one in examples)
        batches, (message, *_), _ = choose_batches(model.train(), examples, max_tokens=40)
        training.append(message.removeprefix("Engine: ").partition(";")[0])

        model.train(not has_dropout(model, examples))  # some routers of experts are random in training
        expected_losses, expected_gradient = plain(model, examples, num_supervised)
        with torch.no_grad():
            results = losses_by_example(model, batches.micro_batches(examples))
            losses = {one.example_id: result.losses for one, result in results}
        found = torch.cat([losses[one.example_id] for one in examples])
        if not (difference := float((found - expected_losses).abs().max())) <= TOLERANCE:
            wrong.append(f"{kind}: losses differ by {difference:.2g}")

        ranks = [[examples[i] for i in part] for part in partition_by_cost(batches.costs(examples), 2)]
        for division, parts in {
            "one batch": [examples],
            "single examples": [[one] for one in examples],
            "ranks": ranks,
        }.items():
            model.zero_grad()
            for part in parts:
                for batch in batches.micro_batches(part):
                    (summed_loss(model, batch) / num_supervised).backward()
            difference = float((gradient(model) - expected_gradient).norm() / expected_gradient.norm())
            if not difference <= TOLERANCE:
                wrong.append(f"{kind}, {division}: gradients differ by {difference:.2g}")

        prompts = [one.input_ids[: one.prompt_length].tolist() for one in examples]
        method = choose_method(model.eval(), prompts, NEW_TOKENS)
        answers.append(method)
        endless = [textbook_answer(model, prompt, None, NEW_TOKENS) for prompt in prompts]
        eos = endless[1][NEW_TOKENS // 2]
        new_ids = [row.ids for row in METHODS[method](model, prompts, generation_settings([eos], NEW_TOKENS))]
        if new_ids != [textbook_answer(model, prompt, eos, NEW_TOKENS) for prompt in prompts]:
            wrong.append(f"{kind}: answers differ")
    return Outcome(training, answers, wrong="; ".join(wrong))


def make_examples(lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Random examples; the prompts begin with the same tokens."""
    random = np.random.default_rng(0)
    prefix = random.integers(3, 300, 64).tolist()
    return [
        example(
            prefix[: prompt // 2] + random.integers(3, 300, prompt - prompt // 2).tolist(),
            random.integers(3, 300, response).tolist(),
            str(number),
        )
        for number, (prompt, response) in enumerate(lengths)
    ]


def plain(
    model: PreTrainedModel, examples: Sequence[Example], num_supervised: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each supervised token, and the gradient of their mean."""
    model.zero_grad()
    losses = torch.cat(list(textbook_losses(model, examples).values()))
    (losses.sum() / num_supervised).backward()
    return losses.detach(), gradient(model)


def gradient(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


if __name__ == "__main__":
    main()
