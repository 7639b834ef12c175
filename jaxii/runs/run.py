"""`Run`: a workdir with its configuration, its checkpoints and, if needed, its data."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from jaxii.config import Config, ModelConfig, check_equal
from jaxii.data import folder, label_embedding
from jaxii.data.labels import Vocabulary
from jaxii.data.prepared import Data
from jaxii.data.seen import SeenImages
from jaxii.decoding.decoders import Decoders
from jaxii.decoding.decoders import load as load_decoders
from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.errors import InputError, nearest
from jaxii.evaluation.evaluator import Evaluator
from jaxii.evaluation.image_records import ImageFiles
from jaxii.evaluation.predictions import decode_nothing
from jaxii.evaluation.predictor import Model, Predict, make_features, make_predict
from jaxii.evaluation.provenance import HOME_SPLITS, Provenance
from jaxii.evaluation.result import EvaluationResult, SplitMetrics
from jaxii.manifest import File
from jaxii.models.multitask import EMBEDDING_HEAD, Network
from jaxii.models.pretrained import Trunk
from jaxii.models.views import augmented_views, mean_over_views
from jaxii.report.run_files import read_sets
from jaxii.runs import assembly
from jaxii.runs.images import Images, Prediction, Predictions, answers, open_images
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, at
from jaxii.train.checkpoint import CheckpointMetadata, Checkpoints, evaluated_params
from jaxii.train.initial_weights import (
    FRESH,
    CheckpointWeights,
    InitialWeights,
    PretrainedWeights,
)
from jaxii.train.stages import BatchSize, Origin, Saved, batches_in_words
from jaxii.train.state import Tree
from jaxii.train.trainer import StagePlan

# Fields that decide which images train and which are held out.
DATA_FIELDS = ("dataset", "labels_file", "validation_fraction", "held_out_domain")
# Fields that decide which pixels of an image are seen.
VIEW_FIELDS = ("image_size_pixels", "crop_share")


class Run(AbstractContextManager["Run"]):
    """A run, opened at one of its checkpoints or assembled for training.

    The data is opened on first use.

    Attributes:
      workdir: The files of the run.
      config: The resolved run configuration.
      checkpoints: The checkpoints of the run.
      start: What the first stage starts from: another run or, with `model.pretrained`,
        its trunk; the trunk of a file of weights; or None for fresh parameters. None,
        too, if the run has a checkpoint.
      stage_provenance: Stage name -> provenance of its checkpoints; empty for a run
        that is not assembled for training.
      batch_sizes: Batch sizes of the checkpoints to come, as in their metadata.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: Config,
        checkpoints: Checkpoints,
        *,
        saved: Saved | None = None,
        data: Data | None = None,
        verify: bool = False,
    ):
        self.workdir = workdir
        self.config = config
        self.checkpoints = checkpoints
        self.start: Run | Trunk | None = None
        self.stage_provenance: Mapping[str, Provenance] = {}
        self.batch_sizes: tuple[BatchSize, ...] = ()
        self._saved = saved
        self._data = data
        self._verify = verify

    @classmethod
    def open(
        cls,
        path: AnyPath | str,
        stage: str = "",
        *,
        data_dir: str = "",
        label_hash: str = "",
        verify: bool = False,
    ) -> "Run":
        """Opens a trained run at the best checkpoint of a stage.

        Args:
          path: The run's workdir.
          stage: Name of the stage; "" for the last one trained.
          data_dir: Folder of the dataset, if it has moved; "" otherwise.
          label_hash: Content hash of the labels that the run must have; "" for any.
          verify: Whether to hash every byte of the data when it is opened.

        Raises:
          InputError: If there is no run, it was not trained, or it has other labels.
        """
        workdir = Workdir(at(path))
        config, found = workdir.config(), workdir.vocabulary().content_hash()
        if label_hash and found != label_hash:
            raise InputError(
                f"{path} was trained on labels with hash {found}, not {label_hash}; "
                "use a run with the same labels in the same order."
            )
        names = [stage.name for stage in config.stages]
        # No label hash: `check_belongs` compares the label file with the checkpoint's.
        checkpoints = Checkpoints(workdir.path, names, "", read_only=True)
        saved = checkpoints.best_of(stage)
        workdir.check_belongs(checkpoints.metadata(saved))
        config = config.moved(data_dir)
        return cls(workdir, config, checkpoints, saved=saved, verify=verify)

    def at_best(self) -> "Run":
        """Returns a shallow copy at the best checkpoint of the last trained stage.

        Raises:
          InputError: If nothing has been trained.
        """
        other = copy.copy(self)
        other._saved = self.checkpoints.best_of()
        return other

    def on(self, data: Data) -> "Run":
        """Returns a shallow copy with other data of the same labels."""
        other = copy.copy(self)
        other._data = data
        return other

    def close(self) -> None:
        """Closes the checkpoints."""
        self.checkpoints.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    # The checkpoint.

    @property
    def saved(self) -> Saved:
        """The checkpoint that the run is opened at."""
        if self._saved is None:
            raise InputError(
                f"{self.workdir.path} has not been trained yet; run train first."
            )
        return self._saved

    @property
    def name(self) -> str:
        """A description of the checkpoint: step, stage and workdir."""
        return (
            f"step {self.saved.step} of stage {self.saved.stage} of {self.workdir.path}"
        )

    @property
    def checkpoint_hash(self) -> str:
        """See `Checkpoints.content_hash`."""
        return self.checkpoints.content_hash(self.saved)

    @property
    def short_side_pixels(self) -> int | None:
        """The short side of the training images; None if it was not recorded."""
        stored = self.checkpoints.metadata(self.saved).short_side_pixels
        # Checkpoints of earlier versions do not have it, but their evaluations do.
        if stored is None and self.workdir.result_file("metrics.json").exists():
            stored = self.metrics.short_side_pixels
        return stored

    @property
    def weights(self) -> CheckpointWeights:
        """The checkpoint, for another run to start from."""
        return CheckpointWeights(
            checkpoints=self.checkpoints, saved=self.saved, source=self.name
        )

    @property
    def provenance(self) -> Provenance:
        """What influenced the weights and the choice of the checkpoint."""
        return self._provenance_in(self.checkpoints.metadata(self.saved))

    def _provenance_in(self, metadata: CheckpointMetadata) -> Provenance:
        """Returns a checkpoint's provenance, with batch sizes not in the config."""
        record = Provenance.from_json(metadata.provenance)
        own = self.config.global_batch_size, self.config.micro_batches
        sizes = metadata.all_batch_sizes()
        if all(size[1:] == own for size in sizes):
            return record
        return record.union(Provenance(batch_sizes=(batches_in_words(sizes),)))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The labels, in the order of the network's outputs."""
        return self.workdir.vocabulary()

    @cached_property
    def mesh(self) -> Mesh:
        """All devices."""
        return make_mesh()

    def provenance_on(self, data: Data, *, same_splits: bool = True) -> Provenance:
        """Returns the provenance of a result on a dataset, perhaps another one.

        In another dataset, test and tuning images are compared by id and file with
        those that the run has seen; matches add their split to the parts that they
        influenced.

        Args:
          same_splits: Whether the run's own dataset is divided into the same splits; if
            not, its images are compared too.

        Raises:
          InputError: If the run was trained on images that the dataset holds out to
            choose thresholds.
        """
        metadata = self.checkpoints.metadata(self.saved)
        record = self._provenance_in(metadata)
        if same_splits and metadata.data_hash == data.content_hash:
            return record
        seen = SeenImages.load(self.workdir.seen_file)
        for name in ("validation", "held_out", "tuning", "test"):
            if not data.has_images(name):
                continue
            counts = seen.count(data.split(name).index)
            if name not in HOME_SPLITS:
                for part in counts:
                    record = record.with_(part, labels=[name])
            elif "weights" in counts:
                raise InputError(
                    f"{self.name} was trained on {counts['weights']} of the "
                    f"{data.split(name).num_examples} images of split {name} of "
                    f"{data.directory}, so thresholds would be chosen on training "
                    "images; use the dataset it was trained on, or one without these "
                    "images."
                )
        return record

    def model(self) -> Model:
        """Returns the network with the parameters and statistics of the checkpoint."""
        restored = self.checkpoints.restore_model(self.saved, replicated(self.mesh))
        params = evaluated_params(restored)
        network = self._network(self.config.model, params)
        return Model(
            apply=self._over_views(network.apply),
            params=params,
            batch_stats=restored["batch_stats"],
            compiler_options=network.compiler_options,
        )

    def in_float32(self, model: Model, *, portable: bool = False) -> Model:
        """Returns a restored model that computes in float32.

        Args:
          portable: Whether to leave out the embedding head and to use only operations
            that suit every platform.
        """
        params = dict(model.params)
        if portable:
            params.pop(EMBEDDING_HEAD, None)
        config = replace(self.config.model, compute_dtype="float32")
        network = self._network(config, params, platform="any" if portable else None)
        return replace(
            model,
            apply=self._over_views(network.apply),
            params=params,
            compiler_options=network.compiler_options,
        )

    def _over_views(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        data = self.config.data
        if not data.test_time_augmentation:
            return apply
        return mean_over_views(apply, augmented_views(mirror=data.mirror))

    def _network(
        self, config: ModelConfig, params: Tree, platform: str | None = None
    ) -> Network:
        head = params.get(EMBEDDING_HEAD)
        dim = 0 if head is None else len(head["bias"])
        return assembly.network_of(config, len(self.vocabulary), dim, platform)

    # Predictions of images that are no part of the data.

    @property
    def classes(self) -> tuple[str, ...]:
        """The codes of the labels, in the order of the columns of probabilities."""
        return tuple(self.vocabulary.codes)

    def figures(self, split: str) -> SplitMetrics:
        """Returns the figures of a split or labelled set, as `evaluate` wrote them.

        Raises:
          InputError: If this checkpoint has not been evaluated, or not on this split.
        """
        self.check_evaluated(self.metrics)
        splits = dict(self.metrics.splits)
        for found in read_sets(self.workdir.path, self.metrics).values():
            splits[found.name] = found.figures
        if split not in splits:
            raise InputError(
                f"{split!r} is not an evaluated split; {nearest(split, splits)}"
                f"use one of {', '.join(splits)}."
            )
        return splits[split]

    @cached_property
    def metrics(self) -> EvaluationResult:
        """The figures that `train` or `evaluate` wrote."""
        return self.workdir.metrics()

    @cached_property
    def decoders(self) -> Decoders:
        """The decoders that were fitted on this checkpoint."""
        self.check_evaluated(self.metrics)
        decoders = self.load_decoders()
        self.workdir.check_current(self.metrics)
        return decoders

    def load_decoders(self, variants: Sequence[str] = ()) -> Decoders:
        """Reads the decoders of an evaluation; see `Workdir.result_file`."""
        made = self.label_embedding
        vectors = None if made is None else made.vectors
        path = self.workdir.result_file("decoders.npz", variants)
        return load_decoders(path, vectors)

    def predict_proba(self, images: Images) -> Float32[np.ndarray, "image class"]:
        """Returns uncalibrated probabilities, as `jaxii predict` writes them.

        Args:
          images: A list of images, or one; or a folder, a CSV or a pattern. An image is
            a path; the bytes of a file; a PIL image; or uint8 [height, width, 3], RGB.
            All are treated like files: turned as EXIF data says, and converted to RGB.

        Raises:
          InputError: If images are of another kind or cannot be read; it names them.
        """
        predict = make_predict([self._model], self.mesh)
        return self._rows(self._open_images(images), predict, len(self.classes))

    def predict(self, images: Images, decoder: str = "") -> Predictions:
        """Returns the labels of each image.

        Args:
          images: See `predict_proba`.
          decoder: Name of the decoder; "" for the one that the evaluation used.

        Raises:
          InputError: If an image cannot be read, or the run has no such decoder.
        """
        decoder = decoder or self.metrics.decoder.name
        has_head = EMBEDDING_HEAD in self._model.params
        self.decoders.check(decoder, self.decoders.names(has_head=has_head))
        source = self._open_images(images)
        predictions: list[Prediction] = []
        predict = make_predict([self._model], self.mesh)
        decode = self.decoders.answer(decoder)
        for given in answers(source, predict, self.config, self.mesh, decode):
            label_ids: list[int] = given.label_ids.tolist()
            predictions.append(
                Prediction(
                    image=source.listing.shown(given.row),
                    labels=tuple(self.vocabulary.codes[i] for i in label_ids),
                    names=tuple(self.vocabulary.names(label_ids)),
                    scores=tuple(float(given.probs[i]) for i in label_ids),
                )
            )
        return Predictions(predictions)

    def features(self, images: Images) -> Float32[np.ndarray, "image feature"]:
        """Returns the pooled features of the trunk, for kNN, clusters, linear probes.

        Args:
          images: See `predict_proba`.
        """
        compute = make_features(self._model, self.mesh)
        width = self._model.num_features(self.config.data.image_size_pixels)
        source = self._open_images(images)
        return self._rows(source, lambda given: (compute(given), None), width)

    @cached_property
    def _model(self) -> Model:
        return self.model()

    def _open_images(self, images: Images) -> ImageFiles:
        short_side = assembly.largest_short_side(self.config, self.short_side_pixels)
        return open_images(images, short_side=short_side)

    def _rows(
        self, source: ImageFiles, predict: Predict, width: int
    ) -> Float32[np.ndarray, "image number"]:
        """Returns a row of numbers for each image."""
        rows = np.zeros((len(source), width), np.float32)
        for given in answers(source, predict, self.config, self.mesh, decode_nothing):
            rows[given.row] = given.probs
        return rows

    # Several runs together.

    def members(
        self, options: InferenceOptions, data: Data | None = None
    ) -> tuple["Run", ...]:
        """Returns this run and the other runs of an ensemble, which it opens.

        Args:
          options: Options that name the other runs.
          data: Dataset that the ensemble is measured on; None for images of a folder.

        Raises:
          InputError: If another run cannot be averaged with this one, or has learned
            from labels of the target domain without permission.
        """
        label_hash = self.vocabulary.content_hash()
        others = [Run.open(path, label_hash=label_hash) for path in options.ensemble]
        for other in others:
            other.check_same_data(self.config)
            check_equal(
                other.config.data,
                self.config.data,
                VIEW_FIELDS,
                f"{other.workdir.path} has data",
                "; average only runs with the same image size and crop.",
            )
            record = other.provenance if data is None else other.provenance_on(data)
            if record.uses_target_labels and not options.allow_tuning_labels:
                raise InputError(
                    f"--ensemble: {other.name} has learned from labels of the target "
                    f"domain ({record.badge()}); add --allow_tuning_labels to allow "
                    "this."
                )
        return self, *others

    def check_evaluated(self, metrics: EvaluationResult) -> None:
        """Checks that an evaluation, and so its decoders, is of this checkpoint.

        Args:
          metrics: The result of the evaluation.

        Raises:
          InputError: If the evaluation is of another checkpoint.
        """
        # The run itself is the first of an ensemble. Earlier versions stored no hash.
        own = self.saved.stage, self.saved.step, self.checkpoint_hash
        measured = metrics.member_hashes[0] if metrics.member_hashes else own[-1]
        if (metrics.stage, metrics.step, measured) != own:
            raise InputError(
                f"the thresholds and the calibration of {self.workdir.path} were "
                f"fitted on step {metrics.step} of stage {metrics.stage}, but the "
                f"checkpoint to use is another one, step {self.saved.step} of stage "
                f"{self.saved.stage}; run evaluate --workdir={self.workdir.path} "
                f"--stage={self.saved.stage} again first."
            )

    def check_same_data(self, config: Config) -> None:
        """Checks that the run has the training images of a configuration.

        Raises:
          InputError: If a field of `DATA_FIELDS` differs; names the field.
        """
        check_equal(
            self.config.data,
            config.data,
            DATA_FIELDS,
            f"{self.workdir.path} has data",
            ", so one may have been trained on images that the other holds out; use a "
            "run with the same data.",
        )

    # The data.

    @property
    def data(self) -> Data:
        """The dataset of the run.

        Raises:
          InputError: If the dataset cannot be opened, has other labels than the run,
            or has no image that evaluation can score.
        """
        if self._data is None:
            self._data = assembly.open_data(self.config, verify=self._verify)
            self.workdir.check_labels(self._data.vocabulary)
            for split in (self._data.choosing_split, "validation"):
                self._data.check_truth(split)
        return self._data

    @cached_property
    def plans(self) -> tuple[StagePlan, ...]:
        """The plan of each stage, in order."""
        return assembly.plans_of(self.config, self.data)

    def plan(self, stage: str) -> StagePlan:
        """Returns a stage's plan by name."""
        return next(plan for plan in self.plans if plan.stage.name == stage)

    @cached_property
    def label_embedding(self) -> label_embedding.LabelEmbedding | None:
        """The label embedding; None if no stage has an embedding head."""
        if not any(stage.embedding_head for stage in self.config.stages):
            return None
        return label_embedding.load(self.workdir.embedding_file)

    def vectors(self) -> Float[Array, "class embed"] | None:
        """Returns the label embeddings on the devices."""
        if self.label_embedding is None:
            return None
        return jax.device_put(self.label_embedding.vectors, replicated(self.mesh))

    def evaluator(self) -> Evaluator:
        """Returns the evaluator of the run's labels."""
        return Evaluator(
            mesh=self.mesh,
            num_classes=len(self.data.vocabulary),
            label_embeddings=self.vectors(),
        )

    @property
    def initial_weights(self) -> InitialWeights:
        """The weights that the first stage starts from."""
        if isinstance(self.start, Run):
            weights = self.start.weights
            return weights if self.config.start_from else weights.trunk()
        if isinstance(self.start, Trunk):
            return PretrainedWeights(
                source=self.start.origin,
                params={"trunk": self.start.params},
                batch_stats={"trunk": self.start.batch_stats},
            )
        return FRESH

    @cached_property
    def history_fault(self) -> str:
        """Why the training history cannot be shown; "" if it can.

        "" for a run assembled for training, which replaces a damaged history.
        """
        latest = self.checkpoints.latest()
        if latest is None or self.stage_provenance:
            return ""
        return self.workdir.history_fault(self.checkpoints.metadata(latest).history)

    def metadata(
        self,
        saved: Saved,
        *,
        recipe: Origin,
        files: Mapping[str, File],
        history: File | None,
        train_step_compilations: int,
    ) -> CheckpointMetadata:
        """Returns the metadata of a checkpoint; the arguments are its fields."""
        return CheckpointMetadata(
            provenance=self.stage_provenance[saved.stage].to_json(),
            config_hash=self.config.content_hash(),
            config=self.config.to_dict(),
            recipe=recipe,
            data_hash=self.data.content_hash,
            short_side_pixels=folder.short_side(self.data.directory),
            files=files,
            train_step_compilations=train_step_compilations,
            history=history,
            label_hash=self.data.vocabulary.content_hash(),
            batch_sizes=self.batch_sizes,
            saved=saved,
        )
