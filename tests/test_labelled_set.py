"""Tests a trained run on other labelled images: figures, and what stays unchanged."""

import json
import re
import shutil

import jax
import polars as pl
import pytest
import small_runs
from small_layers import few_blocks

import jaxii
from jaxii import main
from jaxii.config import Config, default_config
from jaxii.distributed.mesh import make_mesh
from jaxii.errors import InputError
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.tables.notes import Notes
from jaxii.prepare.tables.rows import labels_of
from jaxii.prepare.toy_regions import writer
from jaxii.runs import assembly, labelled_set
from jaxii.runs.run import Run

pytestmark = pytest.mark.usefixtures("without_drawings")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled_set")
    return writer.write(root / "files", num_train=60, num_tuning=4, num_test=29)


@pytest.fixture(scope="module")
def run(files):
    """A run with an embedding head, so that it has every decoder."""
    truth = files / "truth"
    layout = Layout.find(
        files,
        test_labels=truth / "solution.csv",
        test_metadata=truth / "test_meta.csv",
    )
    data = files.parent / "data"
    prepare(layout, data, short_side=64)
    config = default_config()
    config.data.dataset, config.data.directory = "kaggle", str(data)
    config.data.image_size_pixels, config.data.num_threads = 32, 1
    # The network sees the centre, which is also cropped from the images of a set.
    config.data.crop_share = 0.8
    config.model.depth, config.model.width, config.model.stem = 18, 8, "small"
    config.model.compute_dtype = "float32"
    config.label_embedding.dim, config.global_batch_size = 8, 8
    config.stages = (
        {
            "name": "only",
            "terms": {"bce": 1.0, "embedding": 1.0},
            "embedding_head": True,
            "num_steps": 6,
        },
    )
    # Few blocks on one device: the results do not depend on them.
    one = make_mesh(jax.devices()[:1])
    with few_blocks(1, 1, 0, 0), pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxii.runs.run.make_mesh", lambda: one)
        yield jaxii.train(Config.resolve(config), workdir=files.parent / "run")


@pytest.fixture(scope="module")
def labelled_images(files):
    """Only the files of the test split, with their labels and slices."""
    truth = files / "truth"
    table = pl.read_csv(truth / "solution.csv").join(
        pl.read_csv(truth / "test_meta.csv"), on="image_id"
    )
    folder = files.parent / "photos"
    folder.mkdir()
    for name in table["image_id"]:
        shutil.copy(files / "stage_1_test_images" / f"{name}.jpg", folder)
    return folder, table.sample(fraction=1.0, shuffle=True, seed=0)


def one_row_an_image(table, path):
    table.write_csv(path)


def one_row_a_label(table, path):
    rows = table.with_columns(pl.col("labels").str.split(" ")).explode("labels")
    rows.sample(fraction=1.0, shuffle=True, seed=1).write_csv(path, separator="\t")


def a_column_a_label(table, path):
    lists = table["labels"].str.split(" ")
    codes = sorted(set(lists.explode()))
    columns = [lists.list.contains(code).cast(pl.Int8).alias(code) for code in codes]
    table.drop("labels").with_columns(columns).write_parquet(path)


def one_column(table, path):
    code = table["labels"].str.split(" ").explode().mode().sort()[0]
    has = table["labels"].str.split(" ").list.contains(code).cast(pl.Int8)
    pl.DataFrame({"path": table["image_id"], code: has}).write_csv(path)
    return has.sum()


def lists_of_names(table, path, names):
    lists = [[names[code] for code in text.split()] for text in table["labels"]]
    table.with_columns(labels=pl.Series(lists)).write_ndjson(path)


def plain(figures):
    """Returns figures as they are loaded: lists instead of tuples."""
    return json.loads(json.dumps(figures.to_json()))


def folder_of(run, name):
    return run.workdir.path / "sets" / name


@pytest.mark.parametrize(
    ("write", "ending"),
    [
        (one_row_an_image, "csv"),
        (one_row_a_label, "tsv"),
        (a_column_a_label, "parquet"),
        (lists_of_names, "jsonl"),
    ],
)
def test_the_test_split_measured_again_has_the_same_figures_to_the_bit(
    run, labelled_images, tmp_path, write, ending
):
    folder, table = labelled_images
    path = tmp_path / f"labels.{ending}"
    names = dict(zip(run.classes, run.vocabulary.descriptions, strict=True))
    write(table, path, *[names] * (ending == "jsonl"))
    found = jaxii.evaluate(run, images=folder, labels=path, name="again")
    split = plain(run.metrics.splits["test"])
    assert len(split["decoders"]) == 5
    assert len(split["slices"]) > 3
    assert plain(found.figures) == split
    assert run.figures("again") == run.figures("test")
    assert found.constant.f2["again"] == run.metrics.constant.f2["test"]
    written = json.loads((folder_of(run, "again") / "metrics.json").read_text())
    assert written["splits"]["again"] == split


def test_a_set_may_have_a_column_for_one_label_only(run, labelled_images, tmp_path):
    folder, table = labelled_images
    path = tmp_path / "labels.csv"
    num_images = one_column(table, path)
    found = jaxii.evaluate(run, images=folder, labels=path, name="one label")
    assert found.num_images == num_images
    assert found.figures.num_images_without_truth == len(table) - num_images
    shutil.rmtree(folder_of(run, "one label"))


def test_few_images_are_measured_in_a_small_batch(
    run, labelled_images, tmp_path, monkeypatch
):
    folder, table = labelled_images
    for name in table["image_id"][:3]:
        shutil.copy(folder / f"{name}.jpg", tmp_path)
    table[:3].write_csv(tmp_path / "labels.csv")
    sizes, batches = [], assembly.eval_batches

    def watched(*args, **options):
        for batch in batches(*args, **options):
            sizes.append(len(batch["images"]))
            yield batch

    monkeypatch.setattr(assembly, "eval_batches", watched)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    labels = tmp_path / "labels.csv"
    found = jaxii.evaluate(run, images=tmp_path, labels=labels, name="few")
    assert found.num_images == 3
    assert sizes == [4]
    shutil.rmtree(folder_of(run, "few"))


def test_nothing_was_fitted_on_the_set_and_the_run_is_as_before(
    run, labelled_images, tmp_path
):
    before = {
        path.name: path.read_bytes()
        for path in run.workdir.path.iterdir()
        if path.is_file() and path.name not in ("report.html", "evaluation.json")
    }
    found = measured(run, labelled_images, tmp_path, "holiday")
    assert found.provenance.clean
    assert found.provenance == run.metrics.provenance
    assert found.num_seen == {}
    assert found.decoder.choice == run.decoders.choice
    for name, content in before.items():
        assert (run.workdir.path / name).read_bytes() == content


def measured(run, labelled_images, tmp_path, name, table=None):
    folder, whole = labelled_images
    path = tmp_path / "labels.csv"
    one_row_an_image(whole if table is None else table, path)
    return jaxii.evaluate(run, images=folder, labels=path, name=name)


def test_the_report_and_the_comparison_have_the_set(
    run, labelled_images, tmp_path, capsys
):
    found = measured(run, labelled_images, tmp_path, "our <holiday>")
    page = (run.workdir.path / "report.html").read_text()
    assert page.count('<section id="sets">') == 1
    assert page.count('<a href="#sets">') == 1
    assert "our &lt;holiday&gt;" in page
    assert 'href="sets/our%20%253Choliday%253E/report.html"' in page
    assert f"{found.f2:.4f}" in page.partition('<section id="sets">')[2]
    run_command("compare", str(run.workdir.path))
    printed = capsys.readouterr().out
    assert "F2 our <holiday>" in printed
    assert "our <holiday> was evaluated after training; nothing was fitted" in printed
    assert "mAP and coverage are on test." in printed


def run_command(*words):
    return main.main(["jaxii", *words])


def test_a_second_result_of_a_name_replaces_the_first(run, labelled_images, tmp_path):
    _, table = labelled_images
    measured(run, labelled_images, tmp_path, "twice")
    found = measured(run, labelled_images, tmp_path, "twice", table.head(9))
    assert found.num_images == 9
    assert found.figures.num_images_without_truth == 0
    assert plain(run.figures("twice")) == plain(found.figures)
    page = (run.workdir.path / "report.html").read_text()
    assert page.count("<h3><bdi>twice</bdi></h3>") == 1


def test_what_cannot_be_used_is_counted_named_and_in_no_figure(
    run, labelled_images, tmp_path, capsys
):
    folder, table = labelled_images
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    ids = table["image_id"].to_list()
    (photos / f"{ids[0]}.jpg").write_bytes((photos / f"{ids[0]}.jpg").read_bytes()[:90])
    (photos / f"{ids[1]}.jpg").unlink()
    rows = table.with_columns(
        labels=pl.when(pl.col("image_id") == ids[2])
        .then(pl.lit("unheard"))
        .when(pl.col("image_id") == ids[3])
        .then(pl.lit(""))
        .otherwise(pl.col("labels") + " unseen")
    )
    found = measured(run, (photos, rows), tmp_path, "dirty")
    assert found.unknown_labels == ("unheard", "unseen")
    (broken,) = found.broken_images
    assert broken.startswith(f"{ids[0]}.jpg: ")
    assert found.num_images == len(ids) - 4
    assert found.figures.num_images_without_truth == 2
    printed = capsys.readouterr().out
    assert "2 labels that the run does not have: 'unheard', 'unseen'" in printed
    assert "1 names in the label file (1 rows) that match no image" in printed
    assert "1 broken images" in printed
    without = table.filter(~pl.col("image_id").is_in(ids[:4]))
    clean = measured(run, labelled_images, tmp_path, "rest", without)
    clean = {**clean.figures.to_json(), "num_images_without_truth": 2}
    assert found.figures.to_json() == clean


def test_labelled_images_that_the_run_has_learnt_from_are_told(
    run, files, tmp_path, capsys
):
    labels = pl.read_csv(files / "train_human_labels.csv").filter(Confidence=1)
    table = labels.select(image_id="ImageID", labels="LabelName")
    found = measured(run, (files / "train", table), tmp_path, "known")
    assert not found.provenance.clean
    assert "known labels: weights" in found.provenance.badge()
    assert found.num_seen["weights"] > 30
    assert "CAVEAT     Labels of the known split shaped the weights" in (
        capsys.readouterr().out
    )


def test_images_of_training_are_told_in_folders_above_theirs(run, files, tmp_path):
    names = sorted(path.stem for path in (files / "train").rglob("*.jpg"))[:5]
    for name, folder in [(n, "mine") for n in names] + [(names[0], "new")]:
        (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
        (path,) = (files / "train").rglob(f"{name}.jpg")
        shutil.copy(path, tmp_path / "set" / folder)
    rows = [f"mine/{name}.jpg,{run.vocabulary.codes[0]}" for name in names]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["path,label", *rows]))
    found = jaxii.evaluate(run, images=tmp_path / "set", labels=labels, name="above")
    assert sum(found.num_seen.values()) >= 5
    assert not found.provenance.clean


def test_images_of_training_are_found_under_other_names(
    run, files, labelled_images, tmp_path, capsys
):
    folder, _ = labelled_images
    known = sorted((files / "train").rglob("*.jpg"))[:5]
    new = sorted(folder.rglob("*.jpg"))[:3]
    (tmp_path / "set").mkdir()
    rows = ["path,label"]
    for number, path in enumerate([*known, *new]):
        shutil.copy(path, tmp_path / "set" / f"photo{number}.jpg")
        rows.append(f"photo{number}.jpg,{run.vocabulary.codes[0]}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows))
    found = jaxii.evaluate(run, images=tmp_path / "set", labels=labels, name="renamed")
    trained, chosen = found.num_seen["weights"], found.num_seen["thresholds"]
    assert trained + chosen == 5
    assert not found.provenance.clean
    said = capsys.readouterr().out
    assert re.search(r"CAVEAT +\d images have the same ids or files as images", said)


def test_processes_compare_checkpoint_and_decoders_with_the_set(
    run, labelled_images, tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr(
        "jaxii.distributed.processes.check_same",
        lambda digest, problem: found.append(problem),
    )
    measured(run, labelled_images, tmp_path, "compared")
    path = run.workdir.path
    assert found == [
        "the runs are different",
        f"the checkpoint of {path} is different",
        f"the evaluation of {path} is different",
        "the images or labels are different",
    ]
    shutil.rmtree(folder_of(run, "compared"))


def test_domains_are_slices_where_there_are_no_slices(run, labelled_images, tmp_path):
    folder, table = labelled_images
    table = table.drop("slice")
    found = measured(run, (folder, table), tmp_path, "domains")
    assert set(found.figures.slices) == set(table["domain"])
    table = table.drop("domain")
    assert set(measured(run, (folder, table), tmp_path, "domains").figures.slices) == {
        "all"
    }


@pytest.mark.parametrize(
    "name",
    [
        *("test", "validation", "train"),
        *("test_without_recurring", "held_out_without_recurring", "held out"),
    ],
)
def test_the_name_of_a_split_is_refused(run, labelled_images, name):
    folder = labelled_images[0]
    with pytest.raises(InputError, match="use another name for the labelled set"):
        jaxii.evaluate(run, images=folder, name=name)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--tune_on=validation"], "--tune_on applies only to the run's own splits"),
        (["--adapt_bn"], "--adapt_bn applies only to the run's own splits"),
        (["--decoder=top_k"], "--decoder applies only to the run's own splits"),
        (["--stage=only"], "--stage applies only to the run's own splits"),
    ],
)
def test_flags_of_the_splits_are_refused_with_images(words, pattern, capsys):
    words = ["evaluate", "--workdir=x", "--images=y", "--name=z", *words]
    assert run_command(*words) == 2
    assert pattern in capsys.readouterr().err


def test_flags_of_a_set_need_images(capsys):
    assert run_command("evaluate", "--workdir=x", "--labels=y") == 2
    assert "--labels requires --images=DIR" in capsys.readouterr().err


def test_the_command_gives_the_figures_of_the_call_and_needs_no_dataset(
    run, files, labelled_images, tmp_path, capsys
):
    found = measured(run, labelled_images, tmp_path, "call")
    words = (
        f"--workdir={run.workdir.path}",
        f"--images={labelled_images[0]}",
        f"--labels={tmp_path / 'labels.csv'}",
        "--name=command",
    )
    data = files.parent / "data"
    away = data.rename(files.parent / "away")
    assert run_command("evaluate", *words) == 0
    away.rename(data)
    printed = capsys.readouterr().out
    assert f"F2 {found.f2:.4f}" in printed
    assert "fitted     nothing on command" in printed
    assert plain(run.figures("command")) == plain(found.figures)


def test_an_evaluation_keeps_the_sets_that_are_of_its_decoders(
    run, labelled_images, tmp_path, capsys
):
    measured(run, labelled_images, tmp_path, "kept")
    words = ("evaluate", f"--workdir={run.workdir.path}")
    assert run_command(*words) == 0
    page = run.workdir.path / "report.html"
    assert "<bdi>kept</bdi>" in page.read_text()
    assert "is outdated or incomplete" not in capsys.readouterr().out
    assert run_command(*words, "--decoder=top_k") == 0
    assert "the labelled set kept is outdated or incomplete; evaluate it again" in (
        capsys.readouterr().out
    )
    assert "<bdi>kept</bdi>" not in page.read_text()
    assert run_command(*words) == 0
    assert "<bdi>kept</bdi>" in page.read_text()


def test_a_set_is_not_written_if_the_run_is_evaluated_again_meanwhile(
    run, labelled_images, tmp_path, monkeypatch
):
    copy = shutil.copytree(run.workdir.path, tmp_path / "run")
    measure = labelled_set._measure

    def evaluated_again(*args):
        path = copy / "metrics.json"
        metrics = json.loads(path.read_text()) | {"hardware": "another"}
        path.write_text(json.dumps(metrics))
        small_runs.seal(copy)
        return measure(*args)

    monkeypatch.setattr(labelled_set, "_measure", evaluated_again)
    with (
        Run.open(copy) as other,
        pytest.raises(InputError, match="evaluated again while its files were read"),
    ):
        _ = other.decoders
        measured(other, labelled_images, tmp_path, "meanwhile")
    assert not (copy / "sets" / "meanwhile").exists()


def test_a_changed_file_of_a_set_is_refused(run, labelled_images, tmp_path):
    measured(run, labelled_images, tmp_path, "changed")
    file = folder_of(run, "changed") / "metrics.json"
    file.write_text(file.read_text().replace("changed", "changes"))
    with pytest.raises(InputError, match="is damaged"):
        run.figures("changed")
    shutil.rmtree(folder_of(run, "changed"))


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["red fox", "grey wolf"], [["red fox"], ["grey wolf"]]),
        (["cat dog", "dog"], [["cat", "dog"], ["dog"]]),
        (["red fox;cat", "dog"], [["red fox", "cat"], ["dog"]]),
        (['["red fox", "cat"]', '["dog"]'], [["red fox", "cat"], ["dog"]]),
    ],
)
def test_the_labels_of_the_run_say_what_is_between_labels(cells, labels):
    known = {"red fox", "grey wolf", "cat", "dog"}
    found = labels_of(
        cells,
        row_a_label=False,
        separator="",
        notes=Notes(),
        is_known=known.__contains__,
    )
    assert found == labels
