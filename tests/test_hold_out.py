"""Tests runs without each domain in turn, and their thresholds and estimates."""

import csv
import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small_layout
from small_runs import seal

from jaxii.cli import dispatch
from jaxii.cli import hold_out as cli_hold_out
from jaxii.config import Config, default_config
from jaxii.decoding.decoders import load
from jaxii.decoding.thresholds import f2_by_threshold
from jaxii.errors import InputError
from jaxii.evaluation.held_out import errors_of_pools, fit
from jaxii.models.multitask import Network, Outputs
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs.evaluate import evaluate
from jaxii.runs.hold_out import hold_out
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.predict import Request, predict
from jaxii.runs.run import Run
from jaxii.runs.suspects import suspects
from jaxii.runs.train import train
from jaxii.runs.workdir import Workdir
from jaxii.storage import write_json
from jaxii.train.trainer import Preempted
from tests.benchmarks import shifted_figures

pytestmark = pytest.mark.usefixtures("without_drawings")

DOMAINS = ("asia", "eu/west")
RECIPE = {"name": "recipe.py", "own": {"data.directory": ""}}


def make_config(data, **changes):
    config = default_config()
    config.data.dataset, config.data.directory = "kaggle", str(data)
    config.data.image_size_pixels, config.data.validation_fraction = 16, 0.4
    config.global_batch_size, config.model.batch_norm = 8, "global"
    config.stages = ({"name": "only", "terms": {"bce": 1.0}, "num_steps": 2},)
    config.data.update(changes)
    return Config.resolve(config)


def never(step):
    return False


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    files = small_layout.write(root / "files", num_train=24)
    rows = [f"train{i:02d},{DOMAINS[i % 2]}" for i in range(24)]
    small_layout.lines(files / "train_meta.csv", "image_id,domain", *rows)
    truth = "test0,/m/cat", "test1,/m/dog", "test2,/m/boat"
    small_layout.lines(files / "test_labels.csv", "image_id,labels", *truth)
    prepare(Layout.find(files), root / "data", num_workers=1)
    return root / "data"


@pytest.fixture(scope="module")
def swapped(data):
    """The same images and labels; each image belongs to the other domain."""
    files = shutil.copytree(data.parent / "files", data.parent / "swapped_files")
    rows = [f"train{i:02d},{DOMAINS[1 - i % 2]}" for i in range(24)]
    small_layout.lines(files / "train_meta.csv", "image_id,domain", *rows)
    prepare(Layout.find(files), data.parent / "swapped", num_workers=1)
    return data.parent / "swapped"


@pytest.fixture(scope="module")
def relabelled(data):
    """The same training images and labels; the test has other labels."""
    files = shutil.copytree(data.parent / "files", data.parent / "relabelled_files")
    truth = "test0,/m/boat", "test1,/m/dog", "test2,/m/cat"
    small_layout.lines(files / "test_labels.csv", "image_id,labels", *truth)
    prepare(Layout.find(files), data.parent / "relabelled", num_workers=1)
    return data.parent / "relabelled"


def linear(*, num_classes, **_):
    """Returns a network of one matrix, which compiles almost instantly."""

    def init(key):
        kernel = jax.random.normal(key, (3, num_classes))
        return {"classifier": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}, {}

    def apply(params, batch_stats, images, *, train, key):
        features = jnp.mean(images.astype(jnp.float32) / 255.0, axis=(1, 2))
        classifier = params["classifier"]
        logits = features @ classifier["kernel"] + classifier["bias"][None]
        return Outputs(logits, None, features), batch_stats

    return Network(init=init, apply=apply)


@pytest.fixture(scope="module", autouse=True)
def linear_network():
    with oracle.every_network_is(linear):
        yield


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A run on all domains and runs without one, the first of them interrupted."""
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "all")
    config = make_config(data)
    with pytest.raises(Preempted):
        hold_out(workdir, config=config, data_dir="", should_stop=lambda step: True)
    hold_out(workdir, config=None, data_dir="", should_stop=never)
    train(config, workdir, never, recipe=RECIPE)
    return workdir


@pytest.fixture(scope="module")
def tuned(done):
    """The run on all domains, with decoders fitted on the held-out ones."""
    evaluate(done, data_dir="", stage="", tune_on="held_out")
    return done


def metrics(workdir, name="metrics.json"):
    return json.loads((workdir.path / name).read_text())


def recipes_of_parts(monkeypatch, workdir, **options):
    """Returns the recipes of the runs that hold out a part."""
    recipes = []

    def train_in_no_time(config, run, should_stop, *, recipe, **_):
        recipes.append(recipe)
        if len(recipes) == len(DOMAINS):
            raise Preempted(0)

    monkeypatch.setattr("jaxii.runs.hold_out.train", train_in_no_time)
    with pytest.raises(Preempted):
        hold_out(workdir, should_stop=never, **options)
    return recipes


def test_a_run_without_a_domain_has_the_recipe_of_the_run_on_all(
    data, done, tmp_path, monkeypatch
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    shutil.rmtree(copy.path / "held_out")
    own = {"data.held_out_domain": "", "data.directory": ""}
    expected = [{"name": "recipe.py", "own": own}] * 2
    assert recipes_of_parts(monkeypatch, copy, config=None, data_dir="") == expected

    given = {"config": make_config(data), "data_dir": ""}
    new = Workdir(tmp_path / "new")
    assert recipes_of_parts(monkeypatch, new, **given, recipe=RECIPE) == expected
    assert recipes_of_parts(monkeypatch, new, config=None, data_dir="") == [{}, {}]


def test_the_command_gives_the_recipe_of_its_flags(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("jaxii.cli.hold_out.start_jax", lambda *_, **__: None)
    monkeypatch.setattr(
        "jaxii.runs.hold_out.hold_out", lambda *_, recipe, **__: given.append(recipe)
    )
    monkeypatch.setattr("jaxii.distributed.processes.preemption_notice", lambda: never)
    file = Path(__file__).parent.parent / "configs" / "f2_multitask.py"
    words = ["jaxii", f"--workdir={tmp_path}"]
    for more in ([f"--config={file}", "--config.seed=4", "--data_dir=there"], []):
        cli_hold_out.run(dispatch.parse("hold_out", [*words, *more]))
    own = {"seed": 0, "data.directory": ""}
    assert given == [{"name": str(file), "own": own}, {}]


def test_every_domain_has_a_run_that_never_saw_it(done):
    assert list(done.held_out_metrics()) == list(DOMAINS)
    for domain in DOMAINS:
        run = done.held_out(domain)
        assert run.config().data.held_out_domain == domain
        splits = metrics(run)["splits"]
        assert list(splits) == ["held_out", "validation", "test"]
        assert splits["held_out"]["num_images"] == 12


def test_the_held_out_domain_chose_checkpoint_and_threshold(done):
    found = metrics(done.held_out("asia"))
    held_out = found["splits"]["held_out"]
    assert found["decoder"]["chosen_on"] == "held_out"
    assert found["decoder"]["threshold"] == held_out["best_threshold"]
    assert found["provenance"]["model_selection"]["labels"] == ["held_out"]
    assert found["provenance"]["thresholds"]["labels"] == ["held_out"]
    assert found["provenance"]["clean"]


def test_the_held_out_f2_is_followed_beside_validations(done):
    path = done.held_out("asia").history_file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert evaluations
    for row in evaluations:
        assert 0 <= row["held_out/f2"] <= 1
        assert 0 <= row["validation/f2"] <= 1


def test_what_is_done_is_not_trained_again(done, capfd):
    files = (done.path / "held_out").glob("*/metrics.json")
    before = {p: p.stat().st_mtime_ns for p in files}
    hold_out(done, config=None, data_dir="", should_stop=never)
    text = capfd.readouterr().out
    assert "asia (1 of 2)" in text
    assert text.count("already done") == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_table_has_a_row_a_domain_and_the_pooled_threshold(done, capfd):
    hold_out(done, config=None, data_dir="", should_stop=never)
    rows = capfd.readouterr().out.splitlines()[-5:]
    assert [row.split()[0] for row in rows[:4]] == ["held", *DOMAINS, "mean"]
    held_out = [metrics(done.held_out(d))["splits"]["held_out"] for d in DOMAINS]
    curve = np.mean([s["f2_by_threshold"] for s in held_out], axis=0)
    assert rows[3].split()[-1] == f"{curve.max():.4f}"
    assert "--tune_on=held_out" in rows[4]


def test_the_table_has_the_f2_of_decoders_fitted_on_validation(done, capfd):
    capfd.readouterr()
    hold_out(done, config=None, data_dir="", should_stop=never)
    decoder, caveat, *rows = capfd.readouterr().out.splitlines()[-7:-2]
    assert decoder == "decoder    expected_f2, fitted on validation"
    assert caveat.endswith(
        "chosen on the held-out images, so these figures are optimistic"
    )
    for domain, row in zip(DOMAINS, rows[1:], strict=True):
        run = done.held_out(domain)
        f2s = metrics(run)["held_out"]["f2s"][domain]
        figures = metrics(run)["splits"]["held_out"]
        assert row.split()[1:5] == [
            "12",
            f"{f2s['validation']['expected_f2']:.4f}",
            f"{f2s['held_out']['expected_f2']:.4f}",
            f"{figures['best_f2']:.4f}",
        ]


def test_evaluations_of_whole_splits_show_their_progress(done, capfd):
    of_domain = "validation predicted", "held_out predicted", "held_out adapted"
    for workdir, passes in (
        (done, {"fit on validation", "validation", "test"}),
        (done.held_out("asia"), {"fit on held_out", "held_out", "test", *of_domain}),
    ):
        capfd.readouterr()
        evaluate(workdir, data_dir="", stage="", tune_on="")
        text = capfd.readouterr().out
        assert passes <= {
            what for what, _ in re.findall(r"^(.+)  (\d+)/\2$", text, re.M)
        }


def test_adaptation_to_a_whole_split_shows_its_progress(done, capfd, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    options = InferenceOptions(adapt_bn=True)
    evaluate(copy, data_dir="", stage="", tune_on="", options=options)
    assert "adapt to test  3/3" in capfd.readouterr().out.splitlines()


def test_predict_does_not_advise_to_hold_out_the_only_domain(
    data, done, tmp_path, capfd
):
    assert metrics(done)["num_domains"] == len(DOMAINS)
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    found = {**metrics(copy), "num_domains": 1}
    found.pop("held_out", None)
    (copy.path / "metrics.json").write_text(json.dumps(found))
    seal(copy.path)
    request = Request(
        images=str(data.parent / "files" / "train"), output=tmp_path / "answers.csv"
    )
    options = InferenceOptions(label_shift=True)
    predict(copy, request=request, decoder="", options=options)
    text = capfd.readouterr().out
    only = "the training data has only one domain, so none can be held out"
    assert f"the effect of label_shift on new domains is unknown; {only}." in text
    command = f"evaluate --workdir={copy.path} --images=DIR"
    assert f"(error unknown; {only}; {command} measures F2" in text
    assert "run hold_out" not in text


def test_a_run_on_all_domains_tells_both_estimates_beside_the_test(done, capfd):
    evaluate(done, data_dir="", stage="", tune_on="")
    assert "estimates  validation" in capfd.readouterr().out
    found = metrics(done)
    assert found["decoder"]["chosen_on"] == "validation"
    estimates = found["estimates"]
    assert set(estimates) == {"validation", "held_out_domains", "test", "closer"}
    assert set(estimates["held_out_domains"]["domains"]) == set(DOMAINS)
    assert estimates["test"]["f2"] == found["splits"]["test"]["f2"]
    assert estimates["validation"]["f2"] == found["splits"]["validation"]["best_f2"]


def test_the_threshold_of_the_held_out_domains_serves_the_run_on_all(done):
    before = metrics(done)
    evaluate(done, data_dir="", stage="", tune_on="held_out")
    found = metrics(done, "metrics_tuned_on_held_out.json")
    assert found["decoder"]["chosen_on"] == "held_out"
    threshold = found["estimates"]["held_out_domains"]["threshold"]
    assert found["decoder"]["threshold"] == threshold
    assert found["splits"]["test"]["threshold"] == threshold
    assert found["provenance"]["clean"]
    # All choices except the threshold are still made on validation images.
    assert found["provenance"]["thresholds"]["labels"] == ["held_out", "validation"]
    assert metrics(done) == before


def test_predictions_for_a_held_out_domain_are_kept_with_its_figures(done):
    kept = done.held_out_predictions("asia")
    assert sorted(kept.image_ids) == [f"train{i:02d}" for i in range(0, 24, 2)]
    figures = metrics(done.held_out("asia"))["splits"]["held_out"]
    curve = f2_by_threshold(kept.sums())
    np.testing.assert_allclose(curve, figures["f2_by_threshold"])


def test_all_decoders_are_fitted_on_the_pooled_domains(tuned):
    kept = [tuned.held_out_predictions(domain) for domain in DOMAINS]
    wanted = fit(kept)
    found = load(tuned.result_file("decoders.npz", ["tuned_on_held_out"]), None)
    np.testing.assert_array_equal(found.calibration, wanted.calibration)
    np.testing.assert_array_equal(found.class_thresholds, wanted.class_thresholds)
    assert found.choice == wanted.choice
    assert found.expected_f2_offsets == wanted.expected_f2_offsets
    record = metrics(tuned, "metrics_tuned_on_held_out.json")
    assert record["provenance"]["calibration"]["labels"] == ["held_out"]
    errors = errors_of_pools(dict(zip(DOMAINS, kept, strict=True)))
    assert record["held_out"]["expected_f2_errors"] == errors


def test_damaged_predictions_are_refused(done, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    (copy.held_out("asia").path / "held_out.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"held_out.npz is damaged.*run hold_out"):
        evaluate(copy, data_dir="", stage="", tune_on="held_out")


def test_predict_says_what_f2_to_expect_and_what_adapting_did(
    data, tuned, tmp_path, capfd
):
    output = tmp_path / "answers.csv"
    images = str(data.parent / "files" / "train")

    def said(workdir, **options):
        request = Request(images=images, output=output)
        given = InferenceOptions(**options)
        predict(workdir, request=request, decoder="", options=given)
        return capfd.readouterr().out, json.loads(
            Path(f"{output}.provenance.json").read_text()
        )

    text, record = said(tuned)
    errors = metrics(tuned)["held_out"]["expected_f2_errors"]
    decoder = metrics(tuned)["decoder"]["name"]
    error = np.sqrt(np.mean([errors[d][decoder] ** 2 for d in DOMAINS]))
    assert record["expected_f2"]["error"] == pytest.approx(error)
    mean = record["expected_f2"]["mean"]
    assert f"expected F2 of these images: {mean:.2f} ± {error:.2f}" in text
    text, record = said(tuned, adapt_bn=True)
    assert "adapted    adabn: change of F2 on held-out domains +0.00 ± 0.00" in text
    assert record["expected_f2"]["error"] is None
    request = Request(images=images, output=output)
    options = InferenceOptions()
    predict(tuned, request=request, decoder="", options=options, tune_on="held_out")
    record = json.loads(Path(f"{output}.provenance.json").read_text())
    figures = metrics(tuned, "metrics_tuned_on_held_out.json")
    errors = figures["held_out"]["expected_f2_errors"]
    error = np.sqrt(np.mean([errors[d][decoder] ** 2 for d in DOMAINS]))
    assert record["expected_f2"]["error"] == pytest.approx(error)
    assert record["calibration"]["labels"] == ["held_out"]
    text, _ = said(tuned.held_out("asia"), label_shift=True)
    assert "CAVEAT     the effect of label_shift on new domains is unknown" in text
    assert " (error unknown; run hold_out --workdir=" in text


def test_what_was_measured_of_one_evaluation_is_not_shown_for_another(
    data, done, tmp_path
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    evaluate(copy, data_dir="", stage="", tune_on="tuning")
    output = tmp_path / "answers.csv"
    request = Request(images=str(data.parent / "files" / "train"), output=output)
    options = InferenceOptions()
    predict(copy, request=request, decoder="", options=options, tune_on="tuning")
    record = json.loads(Path(f"{output}.provenance.json").read_text())
    assert record["expected_f2"]["error"] is None

    options = InferenceOptions(label_shift=True)
    evaluate(copy, data_dir="", stage="", tune_on="", options=options)
    assert "estimates" not in metrics(copy, "metrics_label_shift.json")
    part = copy.held_out("asia")
    evaluate(part, data_dir="", stage="", tune_on="", options=options)
    estimates = metrics(part, "metrics_label_shift.json")["estimates"]
    assert list(estimates["held_out_domains"]["domains"]) == ["asia"]


def test_predict_takes_a_runs_choosing_split_as_the_default(data, done, tmp_path):
    images = str(data.parent / "files" / "train")
    options, texts = InferenceOptions(), []
    for tune_on in ("", "held_out"):
        request = Request(images=images, output=tmp_path / f"by_{tune_on}.csv")
        run = done.held_out("asia")
        predict(run, request=request, decoder="", options=options, tune_on=tune_on)
        texts.append(request.output.read_text())
    assert texts[0] == texts[1]
    assert done.held_out("asia").tuned_on("validation") == ["tuned_on_validation"]
    assert done.tuned_on("held_out") == ["tuned_on_held_out"]
    assert done.tuned_on("validation") == done.tuned_on("") == []


def test_a_run_with_a_domain_held_out_estimates_by_that_one(done):
    estimates = metrics(done.held_out("asia"))["estimates"]
    assert list(estimates["held_out_domains"]["domains"]) == ["asia"]


def test_without_every_domain_there_is_no_threshold_and_no_estimate(done, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    shutil.rmtree(copy.held_out("asia").path)
    with pytest.raises(InputError, match=r"asia, eu/west.* run hold_out with the same"):
        evaluate(copy, data_dir="", stage="", tune_on="held_out")
    evaluate(copy, data_dir="", stage="", tune_on="")
    assert "estimates" not in metrics(copy)


def test_runs_of_another_configuration_say_nothing_about_a_run(done, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    run = copy.held_out("asia")
    fields = json.loads(run.config_file.read_text())
    fields["seed"] = 3
    run.config_file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"asia differs from .*\(seed: 0 -> 3\)"):
        evaluate(copy, data_dir="", stage="", tune_on="")
    with pytest.raises(InputError, match=r"another configuration \(seed: 3 -> 0\)"):
        hold_out(copy, config=None, data_dir="", should_stop=never)


def test_another_batch_size_is_no_other_configuration(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    file = copy.held_out("asia").config_file
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"global_batch_size": 16}))
    assert set(copy.held_out_metrics()) == set(DOMAINS)
    hold_out(copy, config=None, data_dir="", should_stop=never)
    assert capfd.readouterr().out.count("already done") == 2


def test_an_interrupted_run_may_continue_with_the_batch_size_of_the_run_on_all(
    done, tmp_path
):
    copy = Workdir(tmp_path / "all")
    config = make_config(done.config().data.directory)
    with pytest.raises(Preempted):
        hold_out(copy, config=config, data_dir="", should_stop=lambda step: True)
    write_json(copy.config_file, config.to_dict() | {"global_batch_size": 16})
    words = r"asia belongs to .*8 -> 16\); .*, or --change_batch_size .* to continue"
    with pytest.raises(InputError, match=words):
        hold_out(copy, config=None, data_dir="", should_stop=never)
    hold_out(copy, config=None, data_dir="", should_stop=never, change_batch_size=True)
    sizes = [
        metrics(copy.held_out(d))["provenance"].get("batch_sizes") for d in DOMAINS
    ]
    assert sizes == [["8 images, then 16 images after step 1"], None]


def test_a_finished_run_keeps_its_batch_size_and_can_be_evaluated(done, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    write_json(copy.config_file, copy.config().to_dict() | {"global_batch_size": 16})
    asia = copy.held_out("asia")
    asia.result_file("metrics.json").unlink()
    words = rf"8 -> 16\).*; the run has finished.* evaluate --workdir={asia.path} "
    with pytest.raises(InputError, match=words):
        hold_out(
            copy, config=None, data_dir="", should_stop=never, change_batch_size=True
        )
    evaluate(asia, data_dir="", stage="", tune_on="")
    hold_out(copy, config=None, data_dir="", should_stop=never)


def test_decoders_of_another_stage_need_the_domains_evaluated_at_it(
    data, tmp_path, capfd
):
    workdir = Workdir(tmp_path / "all")
    stage = {"terms": {"bce": 1.0}, "num_steps": 1}
    config = make_config(data).to_dict()
    config["stages"] = [stage | {"name": name} for name in ("first", "last")]
    config = Config.resolve(config)
    hold_out(workdir, config=config, data_dir="", should_stop=never)
    train(config, workdir, never)
    runs = [workdir.held_out(domain) for domain in DOMAINS]
    commands = [f"evaluate --workdir={run.path} --stage=first" for run in runs]
    words = re.escape(f"at stage first; run {' and '.join(commands)} first.")
    with pytest.raises(InputError, match=words):
        evaluate(workdir, data_dir="", stage="first", tune_on="held_out")
    for run in runs:
        evaluate(run, data_dir="", stage="first", tune_on="")
    evaluate(workdir, data_dir="", stage="first", tune_on="held_out")
    capfd.readouterr()
    hold_out(workdir, config=None, data_dir="", should_stop=never)
    said = capfd.readouterr().out
    assert said.count("already done") == 2
    for run in runs:
        assert f"CAVEAT     the figures of {run.path} are of stage first" in said
        assert metrics(run)["stage"] == "first"


def test_a_run_on_another_dataset_is_refused_before_any_is_trained(
    done, swapped, tmp_path, monkeypatch
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    shutil.rmtree(copy.held_out("asia").path)
    monkeypatch.delattr("jaxii.runs.hold_out.train")
    words = r"eu%2Fwest .*a dataset with hash .*as --data_dir, or remove the folder"
    with pytest.raises(InputError, match=words):
        hold_out(copy, config=None, data_dir=str(swapped), should_stop=never)
    assert copy.config() == done.config()


@pytest.mark.parametrize("left", [(), ("metrics.json",), ("held_out.npz",)])
def test_an_interrupted_run_is_checked_before_any_is_trained(
    done, swapped, tmp_path, monkeypatch, left
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    shutil.rmtree(copy.held_out("asia").path)
    interrupted = copy.held_out("eu/west")
    for name in {"metrics.json", "held_out.npz"} - {*left}:
        interrupted.result_file(name).unlink()
    monkeypatch.delattr("jaxii.runs.hold_out.train")
    with pytest.raises(InputError, match=r"eu%2Fwest was trained on .* as --data_dir"):
        hold_out(copy, config=None, data_dir=str(swapped), should_stop=never)
    fields = json.loads(interrupted.config_file.read_text())
    changed = fields | {"global_batch_size": 16}
    interrupted.config_file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"eu%2Fwest belongs to another .*16 -> 8"):
        hold_out(copy, config=None, data_dir="", should_stop=never)


def test_a_run_is_of_the_dataset_that_trained_it_not_of_its_last_evaluation(
    done, relabelled, tmp_path, monkeypatch, capfd
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    asia = copy.held_out("asia")
    evaluate(asia, data_dir=str(relabelled), stage="", tune_on="")
    with monkeypatch.context() as patch:
        patch.delattr("jaxii.runs.hold_out.train")
        words = (
            f"asia was last evaluated on .* run evaluate --workdir={asia.path} --data"
        )
        with pytest.raises(InputError, match=words):
            hold_out(copy, config=None, data_dir="", should_stop=never)
        with pytest.raises(InputError, match="asia was trained on a dataset with hash"):
            hold_out(copy, config=None, data_dir=str(relabelled), should_stop=never)
    evaluate(asia, data_dir=done.config().data.directory, stage="", tune_on="")
    hold_out(copy, config=None, data_dir="", should_stop=never)
    assert capfd.readouterr().out.count("already done") == 2


def test_a_run_and_its_parts_may_all_be_evaluated_on_another_dataset(
    done, relabelled, tmp_path, capfd
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    for run in (*map(copy.held_out, DOMAINS), copy):
        evaluate(run, data_dir=str(relabelled), stage="", tune_on="")
    assert "is left out" not in capfd.readouterr().out
    assert set(metrics(copy)["estimates"]["held_out_domains"]["domains"]) == {*DOMAINS}


def test_a_run_trained_on_another_dataset_says_nothing_wherever_it_is_evaluated(
    done, tmp_path, capfd
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    path = copy.held_out("asia").path
    found = metrics(copy.held_out("asia"))
    found["provenance"]["datasets"] = ["other"]
    (path / "metrics.json").write_text(json.dumps(found))
    seal(path)
    evaluate(copy, data_dir="", stage="", tune_on="")
    text = capfd.readouterr().out
    assert f"CAVEAT     {path} is left out: its dataset has hash other, but" in text
    assert not {"estimates", "held_out"} & metrics(copy).keys()


def test_figures_on_another_dataset_say_nothing_about_a_run(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    path = copy.held_out("asia").path
    found = metrics(copy.held_out("asia")) | {"data_hash": "other"}
    (path / "metrics.json").write_text(json.dumps(found))
    seal(path)
    evaluate(copy, data_dir="", stage="", tune_on="")
    text = capfd.readouterr().out
    assert text.count(f"CAVEAT     {path} is left out") == 1
    assert "has hash other, but" in text
    assert not {"estimates", "held_out"} & metrics(copy).keys()
    with pytest.raises(
        InputError, match=r"its domains .*asia, eu/west at stage .*hold_out"
    ):
        evaluate(copy, data_dir="", stage="", tune_on="held_out")


def test_a_run_whose_evaluation_was_interrupted_is_left_out(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    path = copy.held_out("asia").path
    (path / "evaluation.json").unlink()
    caveat = f"CAVEAT     {path} is left out"
    fix = f"evaluate --workdir={path}"

    evaluate(copy, data_dir="", stage="", tune_on="")
    text = capfd.readouterr().out
    assert (text.count(caveat), text.count(fix)) == (1, 1)
    assert "estimates" not in metrics(copy)

    rows, _ = listed(copy, tmp_path)
    assert {row["domain"] for row in rows if row["split"] == "held_out"} == {"eu/west"}
    text = capfd.readouterr().out
    assert (text.count(caveat), text.count(fix)) == (1, 1)

    evaluate(Workdir(path), data_dir="", stage="", tune_on="")
    assert set(copy.held_out_metrics()) == set(DOMAINS)


def test_errors_of_expected_f2_without_offsets_are_measured_again(
    done, tmp_path, capfd
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    asia = copy.held_out("asia")
    file = asia.result_file("decoders.npz")
    with np.load(file) as arrays:
        older = {name: arrays[name] for name in arrays if "offset" not in name}
    np.savez(file, **older)
    seal(asia.path)
    with pytest.raises(InputError, match=r"another version of jaxii.*run evaluate"):
        asia.metrics()

    evaluate(copy, data_dir="", stage="", tune_on="")
    text = capfd.readouterr().out
    assert f"CAVEAT     {asia.path} is left out" in text
    assert f"by another version of jaxii; run evaluate --workdir={asia.path}" in text
    assert "held_out" not in metrics(copy)

    hold_out(copy, config=None, data_dir="", should_stop=never)
    assert capfd.readouterr().out.count("already done") == 1
    evaluate(copy, data_dir="", stage="", tune_on="")
    assert set(metrics(copy)["held_out"]["expected_f2_errors"]) == set(DOMAINS)


def test_shorter_runs_without_each_domain_say_so(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    begun = (
        r"asia has stages of \[2\] epochs or steps, but this command gives them \[1\]"
    )
    with pytest.raises(InputError, match=begun + r"; pass the --length"):
        hold_out(copy, config=None, data_dir="", should_stop=never, length=0.4)

    shutil.rmtree(copy.path / "held_out")
    hold_out(copy, config=None, data_dir="", should_stop=never, length=0.4)
    for domain in DOMAINS:
        config = copy.held_out(domain).config()
        assert config.stages[0].num_steps == metrics(copy.held_out(domain))["step"] == 1
        assert config.evaluate_every_steps == 80
        assert copy.held_out_length(domain) == 0.5
    assert done.held_out_length("asia") == 1.0
    capfd.readouterr()
    evaluate(copy, data_dir="", stage="", tune_on="held_out")
    caveat = f"CAVEAT     the hold-out runs have 0.5 of the length of {copy.path}, so"
    assert capfd.readouterr().out.count(caveat) == 1
    assert metrics(copy, "metrics_tuned_on_held_out.json")["held_out"]["length"] == 0.5
    for workdir, shown in ((copy, 1), (done, 0)):
        evaluate(workdir, data_dir="", stage="", tune_on="")
        page = (workdir.path / "report.html").read_text()
        assert page.count("trained for 50.0% of the length of this run.") == shown


@pytest.mark.parametrize("length", [0.0, 1.5, float("nan")])
def test_a_length_out_of_range_is_refused(done, length):
    with pytest.raises(InputError, match="use a number above 0 and at most 1"):
        hold_out(done, config=None, data_dir="", should_stop=never, length=length)


def test_epochs_are_shortened_as_steps_are(data, tmp_path, monkeypatch):
    given = []

    def train_in_no_time(config, run, should_stop, **_):
        given.append(config)
        raise Preempted(0)

    monkeypatch.setattr("jaxii.runs.hold_out.train", train_in_no_time)
    config = make_config(data)
    stage = replace(config.stages[0], num_steps=0, num_epochs=60.0)
    config = replace(config, stages=(stage,), evaluate_every_steps=30)
    with pytest.raises(Preempted):
        hold_out(
            Workdir(tmp_path / "run"),
            config=config,
            data_dir="",
            should_stop=never,
            length=0.25,
        )
    assert given[0].stages[0].num_epochs == 15.0
    assert given[0].evaluate_every_steps == 8


def test_folds_do_not_need_the_runs_of_the_domains(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    asia = copy.held_out("asia")
    for fold in ("fold 1 of 2", "fold 2 of 2"):
        run = Workdir(shutil.copytree(asia.path, copy.held_out(fold).path))
        fields = json.loads(run.config_file.read_text())
        fields["data"]["held_out_domain"] = fold
        run.config_file.write_text(json.dumps(fields))
    asia.result_file("evaluation.json").unlink()
    hold_out(copy, config=None, data_dir="", should_stop=never, folds=2)
    text = capfd.readouterr().out
    assert text.count("already done") == 2
    assert "suspects --workdir=" in text


def test_figures_of_another_moment_are_made_again(done, tmp_path, monkeypatch):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    file = copy.held_out("asia").result_file("metrics.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 1}))
    seal(file.parent)
    trained = []
    monkeypatch.setattr(
        "jaxii.runs.hold_out.train",
        lambda config, run, _, **options: trained.append(run),
    )
    hold_out(copy, config=None, data_dir="", should_stop=never)
    assert trained == [copy.held_out("asia")]


@pytest.fixture
def full(without_space):
    """Checks that an action without space for a file names the file."""

    def full(path, act):
        with without_space(path), pytest.raises(OSError) as caught:
            act()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))

    return full


@pytest.mark.parametrize("name", ["held_out.npz", "decoders.npz", "metrics.json"])
def test_runs_without_space_for_a_part_continue_with_the_same_command(
    full, done, tmp_path, name
):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    part = copy.held_out("asia")
    part.result_file("metrics.json").unlink()

    def act():
        hold_out(copy, config=None, data_dir="", should_stop=never)

    full(part.result_file(name), act)
    act()
    assert metrics(part)["splits"] == metrics(done.held_out("asia"))["splits"]


@pytest.mark.parametrize("name", ["suspects.csv", "suspects.html"])
def test_suspects_without_space_name_their_file(full, done, tmp_path, name):
    full(tmp_path / name, lambda: listed(done, tmp_path))
    assert listed(done, tmp_path)[0]


def test_folds_hold_out_every_image_once_and_estimate_no_shift(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    hold_out(copy, config=None, data_dir="", should_stop=never, folds=2)
    rows = capfd.readouterr().out.splitlines()[-5:]
    assert [row[:11].strip() for row in rows[:4]] == [
        "held out", "fold 1 of 2", "fold 2 of 2", "mean"
    ]  # fmt: skip
    assert "suspects --workdir=" in rows[4]
    parts = [metrics(copy.held_out(f"fold {i} of 2")) for i in (1, 2)]
    assert [part["splits"]["held_out"]["num_images"] for part in parts] == [12, 12]
    assert not any("estimates" in part for part in parts)
    hold_out(copy, config=None, data_dir="", should_stop=never, folds=2)
    assert capfd.readouterr().out.count("already done") == 2
    # The results of the domains are unchanged.
    evaluate(copy, data_dir="", stage="", tune_on="held_out")
    estimates = metrics(copy, "metrics_tuned_on_held_out.json")["estimates"]
    assert set(estimates["held_out_domains"]["domains"]) == set(DOMAINS)


def test_copies_among_the_images_of_the_fit_are_named(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    file = copy.held_out("asia").result_file("metrics.json")
    record = json.loads(file.read_text())
    record["recurring"] = {"held_out": 5, "validation": 0}
    file.write_text(json.dumps(record))
    seal(file.parent)
    evaluate(copy, data_dir="", stage="", tune_on="held_out")
    assert "CAVEAT     5 images of asia are near copies" in capfd.readouterr().out


def test_groups_that_a_domain_divides_are_named_without_a_search(data, tmp_path, capfd):
    files = shutil.copytree(data.parent / "files", tmp_path / "files")
    rows = [
        f"train{i:02d},{i // 2 if i < 8 else i},{DOMAINS[i % 2]}" for i in range(24)
    ]
    small_layout.lines(files / "train_meta.csv", "image_id,group,domain", *rows)
    for choice, named in (("ignore", True), ("keep", False)):
        prepare(Layout.find(files), tmp_path / choice, near_copies=choice)
        config = make_config(tmp_path / choice, held_out_domain="asia")
        train(config, Workdir(tmp_path / f"run_{choice}"), never)
        text = capfd.readouterr().out
        assert ("images of held_out share a group with a training" in text) == named


def listed(workdir, folder, top=1000):
    output, sheet = folder / "suspects.csv", folder / "suspects.html"
    suspects(workdir, data_dir="", output=output, sheet=sheet, top=top)
    with output.open(newline="") as file:
        return list(csv.DictReader(file)), sheet.read_text()


def test_suspects_are_predicted_by_the_runs_that_never_saw_them(
    data, done, tmp_path, capfd
):
    rows, page = listed(done, tmp_path)
    assert "predicted 24 of 24 training images" in capfd.readouterr().out
    scores = [float(row["score"]) for row in rows]
    assert rows and scores == sorted(scores, reverse=True) and min(scores) >= 0.5
    files = data.parent / "files" / "train" / "part_0"
    for domain in DOMAINS:
        of_domain = [row for row in rows if row["domain"] == domain]
        with Run.open(done.held_out(domain).path) as run:
            paths = [files / f"{row['image_id']}.jpg" for row in of_domain]
            probs, classes = run.predict_proba(paths), run.classes
        for row, wanted in zip(of_domain, probs, strict=True):
            wanted = wanted[classes.index(row["label"])]
            assert float(row["probability"]) == pytest.approx(wanted, abs=1e-4)
    for row in rows:
        number = int(row["image_id"].removeprefix("train"))
        assert row["domain"] == DOMAINS[number % 2]
        assert row["given"] == str(int(row["label"] == small_layout.CODES[number % 3]))
        assert row["image_id"] in page
    assert listed(done, tmp_path, top=2)[0] == rows[:2]


def test_without_hold_out_suspects_are_those_of_validation(done, tmp_path, capfd):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    shutil.rmtree(copy.path / "held_out")
    rows, page = listed(copy, tmp_path)
    with Run.open(copy.path) as run:
        image_ids = run.data.split("validation").index.image_ids.tolist()
    assert {row["image_id"] for row in rows} <= set(image_ids)
    assert {row["split"] for row in rows} == {"validation"}
    text = capfd.readouterr().out
    assert f"predicted {len(image_ids)} of 24" in text
    assert "hold_out --workdir" in text and "--folds=4" in text
    assert "clean" in page


def compared(command, *words, **options):
    """Returns problem -> digest of all that a command compares between processes."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jaxii.distributed.processes.check_same",
            lambda digest, problem: found.update({problem: digest}),
        )
        command(*words, **options)
    return found


def start_from(workdir):
    config = replace(make_config("data"), start_from=str(workdir.path))
    train(config, Workdir(Path("next")), never)


def resume(workdir):
    train(make_config("data"), workdir, never)


def predict_images(workdir):
    request = Request(images="data/../files/train", output=Path("answers.csv"))
    predict(workdir, request=request, decoder="", options=InferenceOptions())


CHECKPOINT = ("the runs are", "the checkpoint of run is")


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (
            lambda workdir: evaluate(workdir, data_dir="", stage="", tune_on=""),
            (*CHECKPOINT, "the dataset of run (data) is"),
        ),
        (
            lambda workdir: listed(workdir, Path()),
            (*CHECKPOINT, "the dataset of run (data) is"),
        ),
        (
            predict_images,
            ("the images are", *CHECKPOINT, "the evaluation of run is"),
        ),
        (start_from, CHECKPOINT),
        (resume, ("the checkpoints of run are",)),
    ],
)
def test_processes_compare_what_they_read_from_folders_of_one_name(
    data, swapped, tmp_path, monkeypatch, command, wanted
):
    """Each folder stands for a machine, whose disk has a run and its data."""
    found = []
    for name, source in (("one", data), ("same", data), ("other", swapped)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").symlink_to(source)
        (folder / "files").symlink_to(data.parent / "files")
        monkeypatch.chdir(folder)
        if name == "same":
            shutil.copytree(tmp_path / "one" / "run", folder / "run")
        else:
            train(make_config("data"), Workdir(Path("run")), never)
        digests = compared(command, Workdir(Path("run")))
        found.append([digests[f"{problem} different"] for problem in wanted])
    one, same, other = found
    assert one == same
    equal = [mine == theirs for mine, theirs in zip(one, other, strict=True)]
    assert equal == [
        problem in ("the runs are", "the images are") for problem in wanted
    ]


def test_processes_compare_the_runs_that_fit_the_decoders(done, tmp_path):
    copy = Workdir(shutil.copytree(done.path, tmp_path / "copy"))
    problem = f"the hold-out runs of {copy.path} are different"
    options = {"data_dir": "", "stage": "", "tune_on": "held_out"}
    before = compared(evaluate, copy, **options)[problem]
    assert compared(evaluate, copy, **options)[problem] == before
    asia = copy.held_out("asia")
    file = asia.result_file("metrics.json")
    file.write_text(json.dumps(metrics(asia) | {"seed": 1}))
    seal(asia.path)
    assert compared(evaluate, copy, **options)[problem] != before


def test_suspects_among_images_that_were_trained_on_replace_no_list(
    done, swapped, tmp_path, monkeypatch
):
    monkeypatch.delattr("jaxii.runs.suspects.predict_split")
    (tmp_path / "suspects.csv").write_text("before")
    with pytest.raises(InputError, match=r"was trained on .*images of split held_out"):
        suspects(
            done,
            data_dir=str(swapped),
            output=tmp_path / "suspects.csv",
            sheet=tmp_path / "suspects.html",
            top=3,
        )
    assert (tmp_path / "suspects.csv").read_text() == "before"


def test_suspects_that_could_not_be_written_are_not_looked_for(
    done, tmp_path, monkeypatch
):
    monkeypatch.delattr("jaxii.runs.suspects.predict_split")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"s\.html cannot be written \(.*writable"):
        suspects(
            done,
            data_dir="",
            output=tmp_path / "s.csv",
            sheet=tmp_path / "file" / "s.html",
            top=3,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_configuration_that_trains_on_tuning_cannot_hold_out(data, tmp_path):
    config = make_config(data)
    stage = replace(config.stages[0], name="adapted", split="tuning")
    config = replace(config, stages=(*config.stages, stage))
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(InputError, match=r"adapted trains on .*tuning.*hold_out"):
        hold_out(workdir, config=config, data_dir="", should_stop=never)
    assert not workdir.path.exists()


def test_a_configuration_that_holds_a_domain_out_cannot_hold_out_in_turn(
    data, tmp_path
):
    config = make_config(data, held_out_domain="asia")
    with pytest.raises(InputError, match=r"held_out_domain='asia'.* leave it empty"):
        hold_out(Workdir(tmp_path), config=config, data_dir="", should_stop=never)


def test_data_of_one_domain_says_how_to_give_domains(tmp_path):
    files = small_layout.write(tmp_path / "files")
    prepare(Layout.find(files), tmp_path / "data", num_workers=1)
    config = make_config(tmp_path / "data")
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(InputError, match=r"domain 'all'.*--train_metadata.* domain"):
        hold_out(workdir, config=config, data_dir="", should_stop=never)
    assert not workdir.path.exists()


@pytest.mark.parametrize("domain", [".", "..", "a/b", "a b"])
def test_any_domain_has_a_folder_of_its_own(tmp_path, domain):
    path = Workdir(tmp_path).held_out(domain).path
    assert path.resolve().parent == (tmp_path / "held_out").resolve()


def test_the_benchmark_scores_a_test_as_the_evaluation_does(tuned):
    found = shifted_figures.figures(tuned.path, tune_on="held_out", decoder="")
    wanted = metrics(tuned, "metrics_tuned_on_held_out.json")["splits"]["test"]
    assert found.true["test"] == pytest.approx(wanted["f2"])
    assert found.true["all"] == pytest.approx(wanted["slices"]["all"]["f2"])
    assert found.oracle == wanted["best_f2"]
    assert 0 < found.expected["test"] < 1
