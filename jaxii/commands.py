"""What each command does, from plain arguments: data, then training, then figures.

`main` parses the command line and calls one of these; each returns when its files are
on disk, and says where they are.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxii import assemble
from jaxii import config as configuration
from jaxii.console import progress, say
from jaxii.data import embedding, open_images
from jaxii.errors import InputError
from jaxii.infer import predict as prediction
from jaxii.infer import result
from jaxii.infer.evaluate import make_forward
from jaxii.infer.provenance import Provenance
from jaxii.infer.report.compare import compare as make_comparison
from jaxii.infer.report.compare import print_table
from jaxii.infer.report.page import write_report
from jaxii.infer.summary import summarise
from jaxii.infer.thresholds import DecoderChoice, choose
from jaxii.session import Session, describe, open_session
from jaxii.train import loop
from jaxii.train.checkpoint import Checkpoints, evaluated_params
from jaxii.train.mesh import make_mesh, replicated
from jaxii.train.stages import Saved
from jaxii.train.stages import choose as choose_checkpoint
from jaxii.train.telemetry import Telemetry, read_history
from jaxii.workdir import Workdir


def train(
    config: configuration.Config, workdir: Workdir, wanted_back: Callable[[], bool]
) -> None:
    """Trains every stage that is left, then evaluates, reports and writes answers."""
    assemble.check_before_data(config)
    session = open_session(config, workdir)
    for line in describe(session):
        say(line)
    run = _make_run(session, wanted_back)
    saved = [s for found in session.checkpoints.saved().values() for s in found]
    telemetry = Telemetry(
        workdir.path,
        total_steps=sum(plan.stage.num_steps for plan in session.plans),
        start_step=max((s.step for s in saved), default=0),
        is_lead=jax.process_index() == 0,
    )
    with telemetry:
        loop.train(run, telemetry)
    _evaluate(session)
    session.checkpoints.close()


def _make_run(session: Session, wanted_back: Callable[[], bool]) -> loop.Run:
    config, data = session.config, session.data
    evaluator = session.evaluator()
    verified = session.verified_absent("validation")

    def evaluate(settings, params, batch_stats):
        sums = evaluator.run(
            settings.apply,
            params,
            batch_stats,
            assemble.eval_batches(config, data, "validation"),
            verified_absent=verified,
        )
        return evaluator.figures(sums)

    return loop.Run(
        plans=session.plans,
        mesh=session.mesh,
        checkpoints=session.checkpoints,
        batches=partial(assemble.train_batches, config, data),
        evaluate=evaluate,
        label_embeddings=session.vectors(),
        pretrained=assemble.pretrained_start(config),
        metadata={
            "provenance": session.provenance.to_json(),
            "config_hash": configuration.content_hash(config),
        },
        global_batch_size=config.global_batch_size,
        evaluate_every_steps=config.evaluate_every_steps,
        log_every_steps=config.log_every_steps,
        most_skipped_steps=config.most_skipped_steps,
        seed=config.seed,
        wanted_back=wanted_back,
    )


def _evaluate(
    session: Session, *, stage: str = "", tune_on: str = "validation"
) -> dict[str, Any]:
    """Measures the best checkpoint of a stage, writes figures, report and answers."""
    session.data.split(tune_on)
    saved = _checkpoint_of(session.checkpoints, stage)
    plan = session.plan(saved.stage)
    model = session.checkpoints.restore_model(saved, replicated(session.mesh))
    evaluator = session.evaluator()

    def sums_of(split, on_batch=None):
        return evaluator.run(
            plan.settings.apply,
            evaluated_params(model),
            model["batch_stats"],
            assemble.eval_batches(session.config, session.data, split),
            verified_absent=session.verified_absent(split),
            on_batch=on_batch,
        )

    chosen_sums = sums_of(tune_on)
    choice = choose(chosen_sums)
    decoder = prediction.Decoder(name="threshold", choice=choice)
    answers = None
    summaries = {tune_on: summarise(chosen_sums, session.data.slices, choice=choice)}
    if "validation" not in summaries:
        sums = sums_of("validation")
        summaries["validation"] = summarise(sums, session.data.slices, choice=choice)
    if session.data.has_images("test"):
        rows = session.data.split("test").num_examples
        answers = prediction.Answers(rows, decoder)
        sums = sums_of("test", answers.add)
        # A test whose labels nobody has is answered, and not scored.
        if session.data.has_truth("test"):
            summaries["test"] = summarise(sums, session.data.slices, choice=choice)
    provenance = session.provenance.with_("thresholds", labels=[tune_on])
    metrics = _result(session, saved, summaries, decoder, tune_on, provenance)
    if jax.process_index() == 0:
        _write(session, metrics, answers, tune_on)
    return metrics


def _checkpoint_of(checkpoints: Checkpoints, stage: str) -> Saved:
    """Returns the best checkpoint of a stage; "" is the last one trained."""
    found = checkpoints.saved()
    trained = [name for name in found if found[name]]
    if not trained:
        raise InputError(
            f"{checkpoints.directory} has no checkpoint yet; train first with the same "
            "--workdir."
        )
    if stage and stage not in trained:
        raise InputError(f"--stage={stage}; use one of {', '.join(trained)}.")
    return choose_checkpoint(found[stage or trained[-1]], "best")


def _result(session, saved, summaries, decoder, tune_on, provenance) -> dict[str, Any]:
    config, data = session.config, session.data
    counts = data.train_rows.class_counts(len(data.vocabulary))
    constant = result.best_constant_of(
        counts,
        lambda split: data.verified_rows(split).present(),
        list(summaries),
        tune_on,
    )
    return result.make_result(
        saved=saved,
        summaries=summaries,
        decoder={"name": decoder.name, **decoder.parameter(), "chosen_on": tune_on}
        | {"top_k": decoder.choice.top_k, "embedding_k": decoder.choice.embedding_k},
        constant=constant,
        vocabulary=data.vocabulary,
        provenance=provenance,
        facts={
            "config_hash": configuration.content_hash(config),
            "label_hash": data.vocabulary.content_hash(),
            "seed": config.seed,
            "dataset": f"{config.data.dataset} ({data.directory.name})",
            "num_params": _num_params(session, saved),
        },
    )


def _num_params(session: Session, saved: Saved) -> int:
    plan = session.plan(saved.stage)
    params, _ = jax.eval_shape(plan.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _write(session, metrics, answers, tune_on) -> None:
    workdir, data = session.workdir, session.data
    files = {"metrics.json": workdir.result_file("metrics.json", tune_on)}
    if answers is not None:
        files["submission.csv"] = workdir.result_file("submission.csv", tune_on)
        labels, _ = answers.complete(np.zeros(0, np.int64))
        prediction.write_submission(
            files["submission.csv"],
            list(data.split("test").index.image_ids),
            labels,
            data.vocabulary,
            metrics["provenance"],
        )
    prediction.write_json(files["metrics.json"], metrics)
    rows = result.stage_rows(session.plans, session.checkpoints)
    files["report.html"] = write_report(
        workdir.result_file("report.html", tune_on),
        metrics=metrics,
        history=read_history(workdir.history_file),
        config=configuration.to_dict(session.config),
        stages=rows,
    )
    for line in result.lines(metrics):
        say(line)
    for row in rows:
        say(
            f"stage     {row['name']}: steps {row['first_step']}-{row['last_step']}, "
            f"{'with' if row['embedding_head'] else 'without'} embedding head, "
            f"train_step compiled {row['train_step_compilations']} time(s)"
        )
    for name, path in files.items():
        say(f"{name:15} {path}")
    say(f"{'checkpoints':15} {session.checkpoints.directory}")


def evaluate(workdir: Workdir, *, data_dir: str, stage: str, tune_on: str) -> None:
    """Measures a trained run again; nothing is trained."""
    config = workdir.config()
    if data_dir:
        config.data.directory = data_dir
    session = open_session(config, workdir, claim=False)
    _evaluate(session, stage=stage, tune_on=tune_on)
    session.checkpoints.close()


def prepare(
    directory: Path, output: Path, *, short_side: int, overrides: dict[str, Path]
) -> None:
    """Reads the files of a labelled image collection and writes a dataset."""
    layout = open_images.Layout.find(directory, **overrides)
    with progress() as on_progress:
        counts = open_images.prepare(
            layout, output, short_side=short_side, on_progress=on_progress
        )
    for line in counts.lines():
        say(line)
    say(f"dataset   {output}")


def predict(
    workdir: Workdir,
    *,
    images: Path,
    ids: Path | None,
    output: Path,
    decoder: str,
    stage: str,
) -> None:
    """Writes the labels of every picture of a folder."""
    config, vocabulary = workdir.config(), workdir.vocabulary()
    metrics = _metrics(workdir)
    image_ids, files = _files(images, ids)
    mesh = make_mesh()
    checkpoints = Checkpoints(
        workdir.path,
        [stage["name"] for stage in config.stages],
        vocabulary.content_hash(),
    )
    saved = _checkpoint_of(checkpoints, stage or metrics["stage"])
    model = checkpoints.restore_model(saved, replicated(mesh))
    params = evaluated_params(model)
    has_head = loop.EMBEDDING_HEAD in params
    vectors = embedding.load(workdir.embedding_file).vectors if has_head else None
    decode = prediction.Decoder(
        name=decoder,
        choice=_choice(metrics["decoder"], has_head),
        label_embeddings=vectors,
    )
    network = assemble.Networks(
        config=config,
        num_classes=len(vocabulary),
        embedding_dim=vectors.shape[1] if vectors is not None else 0,
    ).get(has_head)
    with progress() as on_progress:
        answers = prediction.answer(
            make_forward(network.apply, mesh),
            params,
            model["batch_stats"],
            assemble.file_batches(config, files),
            num_rows=len(files),
            decode=decode,
            mesh=mesh,
            on_progress=on_progress,
        )
    index = vocabulary.index()
    fallback = np.array([index[code] for code in metrics["constant"]["labels"]])
    labels, damaged = answers.complete(fallback)
    if jax.process_index() == 0:
        prediction.write_submission(
            output, image_ids, labels, vocabulary, metrics["provenance"]
        )
    for row in damaged:
        where = files.paths[row] or f"{image_ids[row]} (no such file)"
        say(f"unreadable {where}: given the most frequent labels")
    badge = Provenance.from_json(metrics["provenance"]).badge()
    said = f"decoder {decoder} {decode.parameter()}; provenance: {badge}"
    say(f"{len(files)} rows, {len(damaged)} of them unreadable; {said}")
    say(f"submission {output}")


def _files(images: Path, ids: Path | None) -> tuple[list[str], prediction.Files]:
    """Returns image ids and their pictures: all of a folder, or those of a list."""
    pictures = prediction.find_pictures(images)
    image_ids = list(pictures) if ids is None else prediction.read_ids(ids)
    paths = tuple(pictures.get(image_id) for image_id in image_ids)
    return image_ids, prediction.Files(paths)


def _choice(decoder: dict[str, Any], has_head: bool) -> DecoderChoice:
    return DecoderChoice(
        threshold=decoder["threshold"],
        top_k=decoder["top_k"],
        embedding_k=decoder["embedding_k"] if has_head else None,
    )


def _metrics(workdir: Workdir) -> dict[str, Any]:
    path = workdir.result_file("metrics.json")
    if not path.exists():
        raise InputError(
            f"{path} does not exist, so no threshold has been chosen; run evaluate "
            "with the same --workdir first."
        )
    return json.loads(path.read_text())


def compare(workdirs: list[Path]) -> None:
    """Prints a table of runs: how they differ, and what came of it."""
    print_table(make_comparison(workdirs))
