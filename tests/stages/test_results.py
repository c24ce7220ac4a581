"""What a finished result depends on: which changes of a recipe or a file leave it, make it again, or are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignx_ds.config import parse
from alignx_ds.data.inputs import read_inputs
from alignx_ds.data.world.files import write_files
from alignx_ds.errors import ConfigError
from alignx_ds.models.base import WORLD_BASES, BaseModel
from alignx_ds.runs import manifest, outputs
from alignx_ds.runtime.failures import LESS_MEMORY
from alignx_ds.stages import results
from alignx_ds.stages.finetune import baseline_fine_tunes
from alignx_ds.stages.stage import StageContext

Snapshot = Callable[[Path], dict[str, bytes | None]]
ZERO3 = Path(__file__).parents[2] / "ds_configs/stage1_zero3.json"
AXES = ("helpful", "harmless", "honest")
SPECIALISTS = [*AXES, "sequential_2_harmless", "sequential_3_honest", "mixed_3_honest"]
MENDED = ["sequential_regularised_2_harmless", "sequential_regularised_3_honest"]
EVERY = [*SPECIALISTS, "alignx", "h3fusion", "trinityx"]


class Run:
    """A recipe whose base model and rows are files, and its output directory, where every result counts as finished."""

    def __init__(self, root: Path, write_recipe: Callable[..., Path]) -> None:
        self.root, self.write_recipe = root, write_recipe
        self.base, self.rows = root / "base", root / "rows"
        shutil.copytree(WORLD_BASES["world"], self.base)
        write_files(self.rows, 40, seed=3)
        self.files = {path.stem: path for path in self.rows.iterdir()}
        self.output = root / "run"
        self.finish()

    def context(self, *overrides: str) -> StageContext:
        schemas = dict(zip(AXES, ("alpaca", "beavertails", "truthfulqa"), strict=True))
        sources = [f"axes.{axis}.train={self.files[f'{schema}_train']}" for axis, schema in schemas.items()]
        recipe = self.write_recipe(f"model.path={self.base}", *sources)
        config = parse.load(recipe, list(overrides))
        inputs = read_inputs(config, BaseModel(config.model))
        return StageContext(config, inputs.base, inputs.data, outputs.Outputs.of(config))

    def finish(self, *overrides: str) -> None:
        context = self.context(*overrides)
        outputs.claim(context.config)
        for stage in results.planned(context, []):
            stage.directory.mkdir(parents=True)
            (stage.directory / "weights").write_text(stage.label)
            manifest.write(stage.directory, stage.inputs, {})

    def stale(self, *overrides: str) -> list[str]:
        """What another start would make again. Raises ConfigError where it is refused."""
        context = self.context(*overrides)
        results.check(context, [])
        stages = list(results.planned(context, []))
        stale = [stage.label for stage in stages if not manifest.is_current(stage.directory, stage.inputs)]
        finished = results.finished(context, [])
        assert all(finished[label] == (label not in stale) for label in finished), "the dry run says the same"
        return stale


@pytest.fixture
def run(tmp_path: Path, write_recipe: Callable[..., Path]) -> Run:
    return Run(tmp_path, write_recipe)


def test_keys_that_no_result_depends_on_may_change_and_files_may_move(run: Run) -> None:
    moved, rows = run.root / "elsewhere", run.root / "renamed.jsonl"
    run.base = run.base.rename(moved)
    run.files["alpaca_train"] = run.files["alpaca_train"].rename(rows.with_suffix(run.files["alpaca_train"].suffix))
    assert run.stale() == []
    free = ("evaluation.batch=3", "evaluation.max_new_tokens=5", "judges.batch=2", "judges.guard=another/guard")
    sets = "evaluation.sets.more={schema: truthfulqa, source: world, judge: truth, rows: 4}"
    spread = (
        "launch.ranks=2",
        "align.ep_size=2",
        "train.accumulation=2",
        "align.checkpoint_activations=true",
        "checkpoints.every=3",
        "nonfinite=skip",
    )
    assert run.stale(*free, sets, *spread, "axes.helpful.judge=''", "baselines.ties_scale=0.3") == []
    assert run.stale("baselines.make=[ties]") == []
    sharded = json.loads(ZERO3.read_text()) | {"zero_optimization": {"stage": 2}}
    (run.root / "sharded.json").write_text(json.dumps(sharded))
    assert run.stale(f"train.deepspeed={run.root / 'sharded.json'}") == []


def test_the_settings_of_lora_count_where_it_is_trained(run: Run) -> None:
    assert run.stale("train.lora.alpha=3", "train.lora.targets=[up_proj]") == []
    shutil.rmtree(run.output)
    run.finish("train.trainable=lora")
    assert run.stale("train.trainable=lora", "experts.feature_rows=7") == []
    for override in ("train.lora.alpha=3", "train.lora.targets=[up_proj]", "experts.rank=3"):
        with pytest.raises(
            ConfigError, match=f"it holds {', '.join(EVERY)}, made with another {override.split('=')[0]}"
        ):
            run.stale("train.trainable=lora", override)


def test_what_is_kept_counts_where_something_is(run: Run) -> None:
    """Results from before these keys are as good as new, and each sequence has its own."""
    assert run.stale("train.keep.rows=7", "baselines.sequential_regularised.fisher=7") == []
    mended = "baselines.make=[sequential_regularised,restored]"
    assert run.stale(mended) == [*MENDED, "restored"]
    with pytest.raises(ConfigError, match=f"it holds {', '.join(SPECIALISTS[:-1])}.*train.keep.collision"):
        run.stale("train.keep.collision=1")
    shutil.rmtree(run.output)
    run.finish(mended)
    assert run.stale(mended, "train.keep.rows=7") == []
    with pytest.raises(ConfigError, match=f"it holds {', '.join(MENDED)}, made with another baselines.sequential_reg"):
        run.stale(mended, "baselines.sequential_regularised.rows=7")


@pytest.mark.parametrize(
    ("override", "blamed", "made"),
    [
        ("train.lr=0.5", "train.lr", EVERY),
        ("train.trainable=lora", "train.trainable", EVERY),
        ("seed=9", "seed", EVERY),
        ("model.dtype=bfloat16", "model.dtype", EVERY),
        (
            "axes.honest.prompt=lie .",
            "axes.honest.prompt",
            ["honest", "sequential_3_honest", "mixed_3_honest", *EVERY[6:]],
        ),
        ("model.template_args={polite: true}", "model.template_args.polite", EVERY),
        ("gate.scope=per_layer", "gate.scope", ["alignx"]),
        ("data.train_rows=20", "data.train_rows", EVERY),
        ("baselines.h3fusion.lr=0.5", "baselines.h3fusion.lr", ["h3fusion"]),
        ("train.deepspeed={root}/sgd.json", "train.deepspeed", EVERY),
        (
            "axes.kind={prompt: be kind ., schema: alpaca, train: world, held_out: world}",
            "axes.kind",
            ["alignx", "h3fusion", "trinityx"],
        ),
    ],
)
def test_another_recipe_for_what_is_finished_is_refused(
    run: Run, snapshot: Snapshot, override: str, blamed: str, made: list[str]
) -> None:
    before = snapshot(run.output)
    template = json.loads(ZERO3.read_text())
    (run.root / "sgd.json").write_text(json.dumps(template | {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}))
    with pytest.raises(ConfigError) as refused:
        run.stale("evaluation.batch=3", "baselines.ties_scale=2", override.replace("{root}", str(run.root)))
    assert f"it holds {', '.join(made)}, made with another {blamed}; choose another output" in str(refused.value)
    assert snapshot(run.output) == before


def test_another_order_of_the_axes_is_another_model(run: Run) -> None:
    """The order of the axes is that of the experts and of the router's labels, and of the sequence of fine-tunes."""
    context = run.context()
    context.config.axes = dict(reversed(context.config.axes.items()))
    with pytest.raises(
        ConfigError,
        match=r"holds sequential_2_harmless, alignx, h3fusion, trinityx, made with another axes \(their order\);",
    ):
        results.check(context, [])


def test_shared_specialists_serve_another_order_of_the_axes_as_long_as_no_baseline_is_made(run: Run) -> None:
    context = run.context(f"specialists={run.output / 'specialists'}", f"output={run.root / 'other'}")
    results.check(context, [])
    context.config.axes = dict(reversed(context.config.axes.items()))
    results.check(context, [], baselines=False)
    with pytest.raises(ConfigError, match="sequential_2_harmless there was made from other inputs"):
        results.check(context, [])
    context.config.train.lr *= 2
    with pytest.raises(ConfigError, match="honest there was made from other inputs"):
        results.check(context, [], baselines=False)


def test_the_specialists_of_a_finished_run_serve_one_with_an_axis_more(run: Run) -> None:
    """Its baselines too: the sequence goes on from the finished one, and the mixed fine-tune lies beside it."""
    kind = "axes.kind={prompt: be kind ., schema: alpaca, train: world, held_out: world}"
    context = run.context(f"specialists={run.output / 'specialists'}", f"output={run.root / 'other'}", kind)
    results.check(context, [])
    assert [tune.name for tune in baseline_fine_tunes(context.config)][-2:] == [
        "sequential_4_kind",
        "mixed_4_kind",
    ]


def test_an_edited_file_makes_everything_again_that_was_made_from_it(run: Run) -> None:
    path = run.files["truthfulqa_train"]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"?", b"!", 1))
    assert run.stale() == ["honest", "sequential_3_honest", "mixed_3_honest", "alignx", "h3fusion", "trinityx"]
    path.write_bytes(whole)
    assert run.stale() == []


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "edit",
    [
        lambda base: _edit(base / "generation_config.json", eos_token_id=[1, 2]),
        lambda base: _edit(base / "tokenizer_config.json", model_max_length=77),
        lambda base: (base / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        lambda base: (base / "special_tokens_map.json").write_text("{}"),
        lambda base: (base / "tokenizer.model").write_text("pieces"),
    ],
)
def test_an_edited_template_tokenizer_or_generation_config_makes_everything_again(
    run: Run, edit: Callable[[Path], object]
) -> None:
    edit(run.base)
    assert run.stale() == EVERY


def test_what_is_not_finished_may_be_made_with_any_recipe(run: Run) -> None:
    for name in ("specialists", "baselines", "model"):
        shutil.rmtree(run.output / name)
    assert run.stale("train.lr=0.5", "seed=9") == EVERY


def test_the_advice_on_too_little_memory_can_be_followed(run: Run) -> None:
    """Every key that the message names may change on the same output, and nothing is made again."""
    keys = re.findall(r"\w+\.\w+", LESS_MEMORY)
    assert {"evaluation.batch", "align.accumulation"} <= set(keys) and "more ranks" in LESS_MEMORY
    assert run.stale(*(f"{key}=2" for key in keys), "launch.ranks=2") == []
