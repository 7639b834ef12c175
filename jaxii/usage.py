"""What `--help` says: one text a command.

Read by `main` alone, before anything heavy is imported.
"""

DECODERS = (
    "threshold",
    "per_class",
    "top_k",
    "embedding",
    "expected_f2",
)
LABEL_SEPARATORS = ("none", "space", ",", ";", "|", "json")
COMMANDS = {
    "train": """Trains every stage of a configuration, then evaluates it and writes a
report and a submission. The same command again goes on where it stopped.

  python -m jaxii.main --config configs/f2_multitask.py
  python -m jaxii.main train --config configs/f2_multitask.py:emoji \\
      --data_dir=data/emoji --workdir=runs/emoji --config.optimizer.peak_lr=0.1

--config=FILE[:DATASET]  recipe and dataset preset; --config.FIELD=VALUE changes a field
--workdir=DIR            the run's folder [runs/RECIPE-DATASET]
--data_dir=DIR           the prepared dataset (not for toy_regions, which is drawn)
--allow_tuning_labels    needed by a stage on the tuning split, and by a start_from
                         whose weights have learnt from its labels
--change_batch_size      go on with another --config.global_batch_size: at the example
                         that was reached, schedules at the same share of their stage
--profile_steps=100:105  trace the updates after step 100 up to step 105 into
                         WORKDIR/profile, for TensorBoard's profile plugin or Perfetto
--verify                 hash every byte of the dataset first; sizes, indexes and the
                         checkpoint that is used are checked in any case
--reuse_batch            train on the first batch again and again, in a --workdir of its
                         own: if that is faster, the input is what limits the run; its
                         figures are no result, and say so

Compiled programs are kept for the next start in $XDG_CACHE_HOME/jaxii/compiled (in
~/.cache where that is not set), or where JAX_COMPILATION_CACHE_DIR says; set it empty
to keep none.

Several processes are one run. Cloud TPU, TPUs on Kubernetes and srun are found by
themselves (evaluate, hold_out, adapt and predict too); elsewhere each process is told:
--coordinator=HOST:PORT  where process 0 listens
--num_processes=N        in all
--process_id=I           of this one, from 0
--start_timeout_seconds=S  how long they wait for one another at the start [60]

Exit: 0 done, 2 something given cannot be used, 75 stopped on request and resumable
(SIGTERM or Ctrl-C), 1 anything else.""",
    "new": """Looks at images and a label file as you have them, says what it
found and assumes, and writes NAME/: a recipe, NAME.py, and label files for prepare.
Images stay where they are. It ends with the two commands that train.

  python -m jaxii.main new mydata --images=photos --labels=labels.csv

--images=DIR             images, in folders or not
--labels=CSV             a column of paths or ids, and labels: a row a label, or a row a
                         image with several labels in a cell or a JSON list there, or
                         a column of 0 and 1 a label [folders are labels]
--path_column=NAME       names the images [whose cells name most]
--label_column=NAME      has the labels [by its name, or the only one left]
--label_separator=CHAR   between labels in a cell: none, space, a comma, a semicolon, a
                         bar, or json [found from all cells; the rule is printed]
--fold_case              labels that differ by case alone are one
--min_images=N         leave out labels that fewer training images have [1]

Columns called split (train, validation, test), group, domain, slice and confidence are
taken as such; see prepare.""",
    "prepare": """Reads a folder in the layout of Kaggle's Inclusive Images challenge
(label CSVs and images of any size, JPEG, PNG or WebP) and writes a TFDS dataset. One
pass over all cores; interrupted, the same command goes on.

  python -m jaxii.main prepare --input_dir=kaggle --data_dir=data/inclusive_images

CSV files name images by id: the file name without folder and suffix. Case matters,
white space around an id does not, and an image suffix is removed where no id has it.

--input_dir=DIR          train_human_labels.csv, classes-trainable.csv and the rest
--data_dir=DIR           where the dataset goes; both may be gs://BUCKET/...
--short_side=PIXELS      larger images are reduced to it [256]
--train_metadata=CSV     image_id and any of group, domain, slice [train_meta.csv]
--test_labels=CSV        image_id,labels: only ever used to score
--test_metadata=CSV      as train_metadata, for tuning and test images
--beam_runner=RUNNER     write the shards through Apache Beam: DirectRunner,
                         DataflowRunner or another; the same records in the same order
--beam_options=LIST      of that runner, by commas: project=P,region=R,...""",
    "evaluate": """Measures the best checkpoint of a run on validation and test, with
every decoder fitted on one split; writes metrics.json, label_figures.csv, report.html
and submission.csv.

  python -m jaxii.main evaluate --workdir=runs/emoji

--workdir=DIR            a trained run
--stage=NAME             the stage whose best checkpoint is measured [the last]
--data_dir=DIR           the dataset, if it has moved
--verify                 hash every byte of the dataset first; sizes, indexes and the
                         checkpoint that is used are checked in any case
--decoder=NAME           whose answers count and are submitted: threshold, per_class,
                         top_k, embedding or expected_f2 [threshold]
--tune_on=SPLIT          fit the decoders on validation, held_out or tuning
                         [held_out where a domain is held out, else validation];
                         after hold_out, held_out takes the threshold found there
--ensemble=RUNS          average with these runs: workdirs with commas between them
--adapt_bn               BatchNorm statistics of each split's own images, without labels
--label_shift            correct for how often labels occur, from images without labels
--allow_tuning_labels    needed with --tune_on=tuning, with an ensemble of which a run
                         has learnt from tuning labels, and with a run that was trained
                         on images of the test; the results say so""",
    "hold_out": """Trains a run's configuration once without each domain of its training
data and measures it there: an estimate of F2 on new domains, and a threshold for them,
without any target data. Interrupted, the same command goes on.

  python -m jaxii.main hold_out --workdir=runs/emoji
  python -m jaxii.main evaluate --workdir=runs/emoji --tune_on=held_out

--workdir=DIR            the run on all domains; those without one lie in DIR/held_out
--config=FILE[:DATASET]  its configuration, where it has not been trained yet
--data_dir=DIR           the dataset, if it has moved
--verify                 hash every byte of the dataset first; sizes, indexes and the
                         checkpoint that is used are checked in any case""",
    "adapt": """Goes on with a trained run on the labels of the tuning split, in a new
workdir, and evaluates it there. Those labels are the target domain's: every figure and
file that comes of it says so. Interrupted, the same command goes on.

  python -m jaxii.main adapt --workdir=runs/emoji --output=runs/emoji_adapted \\
      --allow_tuning_labels

--workdir=DIR            a trained run
--output=DIR             the workdir of the adapted one
--train=PART             all layers or the last_layer alone [all]
--num_epochs=NUMBER      passes over the tuning split [10; last_layer 20]
--peak_lr=RATE           highest learning rate [a tenth of the run's; last_layer: it]
--stage=NAME             the stage whose best checkpoint it starts from [the last]
--data_dir=DIR           the dataset, if it has moved
--verify                 hash every byte of the dataset first; sizes, indexes and the
                         checkpoint that is used are checked in any case
--allow_tuning_labels    needed: the weights learn from the target domain""",
    "predict": """Writes the labels of images: a submission, JSON lines with scores,
or a contact sheet. Needs no dataset, only a workdir that has been evaluated.

  python -m jaxii.main predict --workdir=runs/emoji --images=photos --output=answers.csv
  python -m jaxii.main predict --workdir=runs/emoji --images=list.csv \\
      --output=answers.jsonl --sheet=answers.html
  python -m jaxii.main predict --workdir=runs/emoji --sheet=answers.html --images *.jpg

--workdir=DIR            a trained and evaluated run
--images=DIR             the images in a folder and all folders in it (.jpg, .jpeg,
                         .png, .webp; nothing hidden), sorted by path
--images=CSV             the images that a .csv lists, in its order: a header, paths
                         in the one column named path, file, filename, file_name,
                         image_path or image, taken from the CSV's own folder where
                         they are relative; ids in the column image_id, if it has one
--images=FILES           images and patterns ('photos/**/*.jpg'), by commas, in the
                         order given; words after the flags are further images
--ids=CSV                a sample submission: which ids, in which order [all images];
                         the id of an image is its name without folder and ending
--output=FILE            by its ending: .csv image_id,labels; .jsonl an object a
                         image: image_id, file, decoder, labels (code, name, score),
                         scores (all from 0.01 on), error where it is damaged
                         [WORKDIR/predictions.csv, unless there is a --sheet]
--sheet=HTML             a contact sheet: one page with small images and their labels;
                         of more than 500 images it shows 500, evenly spaced
--decoder=NAME           another decoder than the evaluation's, as in evaluate
--stage=NAME             the stage that was evaluated last; no other is taken
--ensemble=RUNS          average with other runs, as in an evaluate before
--adapt_bn               BatchNorm statistics of these very images
--label_shift            correct for how often labels occur among them
--allow_tuning_labels    as in evaluate

Images are read as prepare reads them. A damaged one, or an id without a file, is
named on stderr, and keeps its row: in a submission with the most frequent labels of
training (as many as do best unseen, see metrics.json), in JSON lines with an error and
no label.

Exit: 0 done, with damaged images too, which the last lines count; 2 something given
cannot be used, or no image can be read.""",
    "export": """Writes a checkpoint as a folder that answers without jaxii: images in
(uint8), probabilities out, for batches of any size. What is written is read back and
has to give the checkpoint's probabilities on images of the validation split.

  python -m jaxii.main export --workdir=runs/emoji --output=exported
  cd exported && python    # import load; load.probabilities(images)

--workdir=DIR            a trained and evaluated run
--output=DIR             a new folder: model.stablehlo (for CPUs, GPUs and TPUs),
                         labels.csv with thresholds, export.json (how an image becomes
                         pixels, provenance), load.py, which needs jax and numpy alone
--onnx                   model.onnx too; pip install 'jaxii[onnx]'
--decoder=NAME           whose thresholds go with it: threshold or per_class [that of
                         the evaluation; the others are no threshold: no answers then]
--stage=NAME             the stage that was evaluated last; no other is taken
--data_dir=DIR           the dataset, if it has moved
--verify                 hash every byte of the dataset first; sizes, indexes and the
                         checkpoint that is used are checked in any case""",
    "plan": """Compiles the train step for a TPU slice that need not be there and says
what it takes of each chip: memory, arithmetic, traffic, collectives; how fast it can be
at best; the largest batch that fits. Trains nothing, writes nothing, needs no TPU, and
no data where the numbers of the published Open Images will do.

  pip install 'jaxii[tpu]'
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:16x16 --device_batch_size=128
  python -m jaxii.main plan --config configs/f2_multitask.py:inclusive_images \\
      --topology=v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16 --device_batch_size=128

--config=FILE[:DATASET]  recipe and dataset preset; --config.FIELD=VALUE changes a field
--topology=NAMES         v5e:4x4 and the like, for v4, v5e, v5p and v6e; several with
                         commas between them are a table of how training scales; local
                         is the devices at hand [local]
--device_batch_size=N    images a chip [the recipe's global_batch_size over the chips of
                         the first topology]
--stage=NAME             whose step is compiled [with the embedding head and most terms]
--data_dir=DIR           the prepared dataset, which tells classes, labels and images
                         [7,178 classes for a kaggle dataset, 7,186 for open_images_v4]
--quick                  compile once: no search for the largest batch

A ResNet-50 takes minutes to compile, and the search two or three compiles more. What
does not fit is the compiler's answer, not an estimate. Times are bounds (a roofline);
the assumptions are printed with them.

Exit: 0 it fits, 2 it does not fit or something given cannot be used.""",
    "doctor": """Looks at this machine and says what would limit a run: versions,
devices, disk, kept programs, the speed of the input path and of a train step. Trains
nothing and keeps nothing but the step's program; takes seconds.

  python -m jaxii.main doctor
  python -m jaxii.main doctor --config=mydata/mydata.py

--config=FILE[:DATASET]  measure its input and its step [a usual recipe's]
--data_dir=DIR           with the images of this dataset [the recipe's, or such as
                         prepare stores, in memory]
--workdir=DIR            whose disk is measured [runs]

Exit: 0 all is well, 1 something is broken; each such line says how to mend it.""",
    "compare": """Prints a table of runs: the fields in which they differ, F2 in domain
and shifted, worst slice, mAP, coverage, threshold, provenance, images/s. Runs that
differ only by their seed are one row, with mean and standard deviation.

  python -m jaxii.main compare runs/a runs/b runs/b/metrics_tuned_on_tuning.json

--output=HTML            write one page with the table and images too
--each                   every run is a row, whatever its seed
--markdown               print the table for a README""",
}


def help_text(words: list[str]) -> str:
    """Returns the help of the first command among the words, or of all of them."""
    for word in words:
        if word in COMMANDS:
            return f"jaxii {word}\n\n{COMMANDS[word]}"
    lines = [
        "jaxii trains multi-label image classifiers, from label files to a submission.",
        "",
        "usage: python -m jaxii.main [COMMAND] [FLAGS]      (COMMAND --help says more)",
        "",
    ]
    for name, text in COMMANDS.items():
        first = text.partition("\n\n")[0].replace("\n", f"\n{'':10}")
        lines.append(
            f"{name:10}{first}" + ("  (the default)" if name == "train" else "")
        )
    return "\n".join(lines)
