"""`doctor`: checks this machine and measures what would limit a run."""

from pathlib import Path
from typing import Any

import jax

from jaxii.config import Config, default_config
from jaxii.console import say
from jaxii.data import folder
from jaxii.data.records import RandomAccess
from jaxii.doctor import checks
from jaxii.doctor.speed import HEIGHT, WIDTH, Drawn
from jaxii.errors import CheckFailed
from jaxii.models.cpu import has_fast_bfloat16
from jaxii.prepare import recipe as recipes
from jaxii.prepare.threads import num_cores
from jaxii.runs import assembly, speed
from jaxii.runs.plan import Facts, facts_of
from jaxii.runs.speed import Speed
from jaxii.storage import AnyPath

# The dataset that is assumed without a recipe.
USUAL = {"num_images": 10_000, "num_labels": 100, "short_side": 256}


def doctor(config: Config | None, *, place: AnyPath) -> None:
    """Prints versions, devices, free space, and the speed of input and step.

    Args:
      config: The run's configuration; None for a recipe as `new` would write it.
      place: The folder of the run's workdir.

    Raises:
      CheckFailed: If a check fails.
    """
    findings = [checks.versions(), checks.devices()]
    if isinstance(place, Path):
        findings.append(checks.disk(place))
    broken = [text for finding in findings for text in finding.broken]
    for line in (line for finding in findings for line in finding.lines):
        say(line)
    if findings[1].lines:
        if config is not None:
            assembly.check_before_data(config)
        what = "default recipe" if config is None else "this recipe"
        for line in _speeds(_usual_config() if config is None else config, what):
            say(line)
    for text in broken:
        say(f"BROKEN    {text}")
    if broken:
        raise CheckFailed(f"problems found: {len(broken)}; see the BROKEN lines above.")
    say("all checks passed")


def _speeds(config: Config, what: str) -> list[str]:
    """Measures input and step, and returns lines with both and the limit."""
    source, facts, of = _data(config)
    measured = speed.measure(config, source, facts)
    cores, model = num_cores(), config.model
    size = config.data.image_size_pixels
    return [
        f"input     {measured.input:,.0f} images/s at {size} pixels, on {cores} cores "
        f"({measured.input / cores:,.0f} per core): {of}",
        f"step      {measured.step:,.0f} images/s: {what}, {model.variant} "
        f"{model.depth}, width {model.width}, {size} pixels, {measured.batch_size} "
        f"images per step (first step {measured.first_step_seconds:.0f} s)",
        _limit(measured, jax.default_backend()),
    ]


def _limit(measured: Speed, platform: str) -> str:
    given, taken = measured.input, measured.step
    if platform == "cpu":
        both = measured.images_per_second
        return (
            f"limit     about {both:,.0f} images/s: input and step share the cores, "
            f"and the step takes {both / taken:.0%} of the time"
        )
    if given < taken:
        return (
            f"limit     the input: {taken / given:.1f} times as many cores would keep "
            "the devices busy"
        )
    return f"limit     the step: the input is {given / taken:.1f} times as fast"


def _usual_config() -> Config:
    recipe: Any = default_config()
    facts = recipes.Facts(
        name="usual",
        num_evaluated=0,
        num_groups=USUAL["num_images"],
        num_domains=1,
        has_validation=False,
        platform=jax.default_backend(),
        num_devices=jax.device_count(),
        fast_bfloat16=has_fast_bfloat16(),
        **USUAL,
    )
    # The number of epochs does not matter here.
    pace = recipes.Pace(images_per_second=1000.0, start_seconds=0.0)
    chosen = recipes.choose(facts, lambda fields: pace)
    values = {choice.field: choice.value for choice in chosen.choices}
    recipe.update_from_flattened_dict(
        {"data.dataset": "kaggle", **values, "stages": tuple(chosen.stages)}
    )
    return Config.resolve(recipe)


def _data(config: Config) -> tuple[RandomAccess, Facts, str]:
    """Returns records to decode, their sizes, and their source as text."""
    is_drawn = config.data.dataset == "toy_regions"
    absent = "no data was given"
    if config.data.directory or is_drawn:
        directory: AnyPath = assembly.data_directory(config)
        # Opening a dataset that is not drawn yet would draw it, which takes a minute.
        if (directory / folder.INFO_FILE).exists() if is_drawn else directory.is_dir():
            data = assembly.open_data(config)
            source = data.split("train").source
            return source, facts_of(config), f"training images of {directory}"
        absent = f"{directory} does not exist yet"
    has_embedding = any(stage.embedding_head for stage in config.stages)
    fewest = config.label_embedding.dim if has_embedding else 0
    facts = Facts(
        num_classes=max(fewest, USUAL["num_labels"]),
        num_slots=8,
        num_images=USUAL["num_images"],
        source="",
    )
    drawn = f"{WIDTH}x{HEIGHT} JPEGs in memory, because {absent}"
    return Drawn(), facts, drawn
