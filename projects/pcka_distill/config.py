"""The keys that this project adds to Detectron2's config."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_pcka_distill_config"]


def add_pcka_distill_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL``, ``MODEL.FCOS`` and three keys of ``SOLVER``, with their defaults."""
    # "SGD" is Detectron2's own. "AdamW" reads SOLVER.BASE_LR and WEIGHT_DECAY. It has to live
    # outside MODEL.DISTILL because a plain student and a teacher are trained with it too.
    # Other projects add the same key: theirs stays.
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"
    # Take each batch in so many parts, and make one update of their mean gradient.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Compute the activations of the trained ResNet again in backward instead of keeping them.
    cfg.SOLVER.ACTIVATION_CHECKPOINT = False

    cfg.MODEL.DISTILL = CN()
    # The student's own meta-architecture, e.g. "RetinaNet"; the rest of MODEL describes it.
    cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE = ""
    # Names in the registry of losses: "PCKALoss", "RCKALoss", "MimicLoss", or your own.
    # Each is configured by its node below. A loss with WEIGHT 0 is not built at all.
    cfg.MODEL.DISTILL.LOSSES = ()

    cfg.MODEL.DISTILL.TEACHER = CN()
    # The teacher's own config, a yaml or a LazyConfig: a path, or a name in Detectron2's model zoo.
    cfg.MODEL.DISTILL.TEACHER.CONFIG_FILE = ""
    # Its checkpoint. Empty: the model zoo's, if CONFIG_FILE is a zoo name.
    cfg.MODEL.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on a command line: ["MODEL.X", value, ...].
    cfg.MODEL.DISTILL.TEACHER.OPTS = []
    # Only warn if its checkpoint does not fit it exactly, instead of refusing to run.
    cfg.MODEL.DISTILL.TEACHER.ALLOW_PARTIAL = False

    # What it is run in: "float32", "bfloat16", "float16" (CUDA only), or "" for the student's.
    cfg.MODEL.DISTILL.TEACHER.PRECISION = ""
    # Memory layout of its weights and maps; pays on a CPU, and on tensor cores.
    cfg.MODEL.DISTILL.TEACHER.CHANNELS_LAST = False
    # torch.compile its backbone: slow at first and again for new image sizes, then faster.
    cfg.MODEL.DISTILL.TEACHER.COMPILE = False
    # Keep its feature maps on disk, for training images that come back unchanged (no random
    # crops or sizes, batches of one padded size). DIR "" keeps none; with one PRECISION "" is
    # "float32".
    cfg.MODEL.DISTILL.TEACHER.CACHE = CN()
    cfg.MODEL.DISTILL.TEACHER.CACHE.DIR = ""
    cfg.MODEL.DISTILL.TEACHER.CACHE.MAX_GB = 20.0

    # Common to the losses:
    #   WEIGHT        factor of the loss
    #   WARMUP_ITERS  iterations over which the weight rises linearly; 0 for none
    #   LEVELS        the student's feature levels; () for all that the teacher matches

    # PCKA: relations between patches of feature maps (paper section 3.4).
    cfg.MODEL.DISTILL.PCKA = CN()
    cfg.MODEL.DISTILL.PCKA.WEIGHT = 1.0
    cfg.MODEL.DISTILL.PCKA.WARMUP_ITERS = 0
    cfg.MODEL.DISTILL.PCKA.LEVELS = ()
    # Side of a patch in cells of the map: one for all levels, or one for each of LEVELS.
    cfg.MODEL.DISTILL.PCKA.PATCH_SIZE = (16,)
    # What is a sample: "spatial" (the paper's), "sample", "per_image" or "per_position".
    cfg.MODEL.DISTILL.PCKA.LAYOUT = "spatial"
    # Centre the Gram matrices. The paper's formula does, its published code does not.
    cfg.MODEL.DISTILL.PCKA.CENTER = True
    # Use the unbiased HSIC estimator.
    cfg.MODEL.DISTILL.PCKA.DEBIASED = False
    # Weights of the relations between patches and of those between positions in a patch.
    cfg.MODEL.DISTILL.PCKA.INTRA_WEIGHT = 1.0
    cfg.MODEL.DISTILL.PCKA.INTER_WEIGHT = 0.0

    # RCKA: relations in the logits of the head (paper section 3.3).
    cfg.MODEL.DISTILL.RCKA = CN()
    cfg.MODEL.DISTILL.RCKA.WEIGHT = 1.0
    cfg.MODEL.DISTILL.RCKA.WARMUP_ITERS = 0
    # Levels of a dense head, or stages of a cascade ("stage0", ...); () for all.
    cfg.MODEL.DISTILL.RCKA.LEVELS = ()
    # Dense heads: rows an image, the teacher's best-scored; 0 for all. Box heads: not used.
    cfg.MODEL.DISTILL.RCKA.TOPK_PER_IMAGE = 50
    # And of them only those that the student's labels match with an object.
    cfg.MODEL.DISTILL.RCKA.FOREGROUND_ONLY = False
    cfg.MODEL.DISTILL.RCKA.CENTER = True
    # Weights of the relations between samples and of those between classes.
    cfg.MODEL.DISTILL.RCKA.INTRA_WEIGHT = 1.0
    cfg.MODEL.DISTILL.RCKA.INTER_WEIGHT = 1.0
    # Relate samples by softmax(logits / TEMPERATURE); 0 for the logits themselves.
    cfg.MODEL.DISTILL.RCKA.TEMPERATURE = 0.0

    # Mimic: MSE of the feature maps after a 1x1 convolution on the student's side (FitNets).
    cfg.MODEL.DISTILL.MIMIC = CN()
    cfg.MODEL.DISTILL.MIMIC.WEIGHT = 1.0
    cfg.MODEL.DISTILL.MIMIC.WARMUP_ITERS = 0
    cfg.MODEL.DISTILL.MIMIC.LEVELS = ()

    # Other projects have an FCOS of their own: theirs stays.
    if "FCOS" not in cfg.MODEL:
        _add_fcos(cfg)


def _add_fcos(cfg: CN) -> None:
    """FCOS: Detectron2 has the model and no keys for it. The defaults are its own."""
    cfg.MODEL.FCOS = CN()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each branch of the head, and their norm.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Locations within this many strides of a box's centre are positive.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Scores are the square root of class score times centerness.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6
