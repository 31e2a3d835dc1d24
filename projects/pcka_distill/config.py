"""The keys that this project adds to Detectron2's config."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

__all__ = ["add_pcka_distill_config"]

_FEATURE_LOSSES = ("PCKA", "MIMIC", "AT", "CWD", "PKD", "FGD", "MGD", "FCKA", "SP", "REVIEWKD")
_LOGIT_LOSSES = ("RCKA", "KD", "DKD", "DIST")


def add_pcka_distill_config(cfg: CN) -> None:
    """Add ``MODEL.DISTILL``, ``MODEL.FCOS`` and what trains both, with their defaults."""
    # "SGD" is Detectron2's own. "AdamW" reads SOLVER.BASE_LR and WEIGHT_DECAY. It has to live
    # outside MODEL.DISTILL because a plain student and a teacher are trained with it too.
    # Other projects add the same key: theirs stays.
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"
    # Take each batch in so many parts, and make one update of their mean gradient.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Compute the activations of the trained ResNet again in backward instead of keeping them.
    cfg.SOLVER.ACTIVATION_CHECKPOINT = False
    # What SOLVER.AMP computes in: "float16" (CUDA only), "bfloat16", or "" for float16 on CUDA and
    # bfloat16 on a CPU.
    if "PRECISION" not in cfg.SOLVER.AMP:
        cfg.SOLVER.AMP.PRECISION = ""
    # How many steps of a run may be left out because a loss or a gradient is not finite; one more
    # ends it, with a dump of what it came from.
    cfg.SOLVER.SKIP_NONFINITE = 0
    # Every so many iterations, log what share each loss has in the student's gradient; 0 for never.
    # It costs a backward for each loss.
    cfg.SOLVER.GRADIENT_MONITOR_PERIOD = 0
    # Let torch use only what gives the same numbers in every run, of a GPU too; slower. What it has
    # in no such way ends the run.
    cfg.SOLVER.DETERMINISTIC = False
    # How many images may be unreadable before the run stops; others stand in for them.
    cfg.DATALOADER.MAX_UNREADABLE = 0
    # Let a config name functions to call. No file can set it: it is for the command line.
    cfg.TRUST_CONFIG = False
    # Read checkpoints that hold more than tensors and numbers, and proposal files: both can run any
    # program. For the command line, too.
    cfg.TRUST_CHECKPOINT = False

    cfg.MODEL.DISTILL = CN()
    # The student's own meta-architecture, e.g. "RetinaNet"; the rest of MODEL describes it.
    cfg.MODEL.DISTILL.STUDENT_ARCHITECTURE = ""
    # Names in the registry of losses, "PCKALoss" and the others below, or your own.
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

    # Refuse to train if its box AP is lower, in percent, on so many images of the first of
    # DATASETS.TEST; 0 does not ask.
    cfg.MODEL.DISTILL.TEACHER.MIN_AP = 0.0
    cfg.MODEL.DISTILL.TEACHER.MIN_AP_IMAGES = 100

    # What it is run in: "float32", "bfloat16", "float16" (CUDA only), or "" for the student's.
    cfg.MODEL.DISTILL.TEACHER.PRECISION = ""
    # Memory layout of its weights and maps; pays on a CPU, and on tensor cores.
    cfg.MODEL.DISTILL.TEACHER.CHANNELS_LAST = True
    # torch.compile its backbone: slow at first and again for new image sizes, then faster.
    cfg.MODEL.DISTILL.TEACHER.COMPILE = False
    # Keep its feature maps on disk, for training images that come back unchanged (no random
    # crops or sizes, batches of one padded size). DIR "" keeps none; with one PRECISION "" is
    # "float32".
    cfg.MODEL.DISTILL.TEACHER.CACHE = CN()
    cfg.MODEL.DISTILL.TEACHER.CACHE.DIR = ""
    cfg.MODEL.DISTILL.TEACHER.CACHE.MAX_GB = 20.0

    # Every loss has a node of its name. They compare feature maps, and the last four the logits of
    # the heads.
    for name in _FEATURE_LOSSES + _LOGIT_LOSSES:
        node = cfg.MODEL.DISTILL[name] = CN()
        # Factor of the loss.
        node.WEIGHT = 1.0
        # Iterations over which the weight rises linearly; 0 for none.
        node.WARMUP_ITERS = 0
        # First and last iteration of its linear fall to 0; () for none.
        node.DECAY_ITERS = ()
        # The student's feature levels, () for all that the teacher matches; of a loss on logits the
        # levels of a dense head, or the stages of a cascade ("stage0", ...).
        node.LEVELS = ()
    for name in _LOGIT_LOSSES:
        node = cfg.MODEL.DISTILL[name]
        # Dense heads: rows an image, the teacher's best-scored; 0 for all. Elsewhere not used: all
        # regions of a box head, all pixels of a segmentation.
        node.TOPK_PER_IMAGE = 50
        # And of them only those that the student's labels match with an object.
        node.FOREGROUND_ONLY = False

    # PCKA: relations between patches of feature maps (paper section 3.4).
    node = cfg.MODEL.DISTILL.PCKA
    # Side of a patch in cells of the map: one for all levels, or one for each of LEVELS.
    node.PATCH_SIZE = (16,)
    # What is a sample: "spatial" (the paper's), "sample", "per_image", "per_position" or "batch".
    node.LAYOUT = "spatial"
    # The loss of a CKA: "cka" (the paper's 1 - CKA), "sqrt" (1 - its root) or "log" (- its log);
    # "signed" compares the samples themselves, up to offset and scale.
    node.FORM = "cka"
    # Where every channel is a CKA (spatial, sample): "equal", or by the teacher's "variance".
    node.CHANNEL_WEIGHT = "equal"
    # Centre the Gram matrices. The paper's formula does, its published code does not.
    node.CENTER = True
    # Use the unbiased HSIC estimator.
    node.DEBIASED = False
    # Weights of the relations between patches and of those between positions in a patch.
    node.INTRA_WEIGHT = 1.0
    node.INTER_WEIGHT = 0.0

    # RCKA: relations in the logits of the head (paper section 3.3).
    node = cfg.MODEL.DISTILL.RCKA
    node.CENTER = True
    # Weights of the relations between samples and of those between classes.
    node.INTRA_WEIGHT = 1.0
    node.INTER_WEIGHT = 1.0
    # Relate samples by the scores, softmax or sigmoid as the head has, of logits / TEMPERATURE, and
    # classes by those of a sigmoid; 0 for the logits themselves.
    node.TEMPERATURE = 0.0
    # What a sample is: "rows" (regions, anchors, pixels), or of a segmentation "images".
    node.SAMPLES = "rows"

    # FCKA: relations between the images of a batch.
    cfg.MODEL.DISTILL.FCKA.CENTER = True
    # What softmax or sigmoid divide by.
    for name in ("CWD", "KD", "DKD", "DIST"):
        cfg.MODEL.DISTILL[name].TEMPERATURE = 1.0
    # DKD: weights of the target class and of the others.
    cfg.MODEL.DISTILL.DKD.ALPHA = 1.0
    cfg.MODEL.DISTILL.DKD.BETA = 0.25
    # DIST: weights of the correlations over the classes and over the samples.
    cfg.MODEL.DISTILL.DIST.INTER_WEIGHT = 1.0
    cfg.MODEL.DISTILL.DIST.INTRA_WEIGHT = 1.0
    # FGD: weights of objects, background, attention and the global part; temperature of attention.
    # These are for RetinaNet; FCOS has 1.6e-3, 8e-4, 8e-4 and 8e-6, two-stage detectors 5e-5,
    # 2.5e-5, 5e-5 and 5e-7.
    cfg.MODEL.DISTILL.FGD.ALPHA = 1e-3
    cfg.MODEL.DISTILL.FGD.BETA = 5e-4
    cfg.MODEL.DISTILL.FGD.GAMMA = 1e-3
    cfg.MODEL.DISTILL.FGD.GLOBAL_WEIGHT = 5e-6
    cfg.MODEL.DISTILL.FGD.TEMPERATURE = 0.5
    # MGD: share of the student's cells that is blanked.
    cfg.MODEL.DISTILL.MGD.MASK_RATIO = 0.65
    # ReviewKD: channels in which levels are fused; 0 for the teacher's, at most 512.
    cfg.MODEL.DISTILL.REVIEWKD.HIDDEN = 0

    # ImageClassifier: a network by its name, "cifar/resnet20", "torchvision/resnet18",
    # "timm/mobilenetv1_100", and the classes of its last layer.
    cfg.MODEL.CLASSIFIER = CN()
    cfg.MODEL.CLASSIFIER.NAME = ""
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Height and width of its images.
    cfg.MODEL.CLASSIFIER.IMAGE_SIZE = 224
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # How its training images are made: "resized_crop" (a random part of the image, mirrored at
    # random; for evaluation the centre), "padded_crop" (shifted by up to an eighth of their size,
    # mirrored at random) or "none".
    cfg.INPUT.CLASSIFICATION = CN()
    cfg.INPUT.CLASSIFICATION.AUGMENTATION = "resized_crop"

    # PSPHead; the rest of it is in MODEL.SEM_SEG_HEAD.
    cfg.MODEL.PSP_HEAD = CN()
    # Sides of the grids that the map is averaged over.
    cfg.MODEL.PSP_HEAD.POOL_SIZES = [1, 2, 3, 6]
    cfg.MODEL.PSP_HEAD.DROPOUT = 0.1
    # Level of the auxiliary head, "" for none, and the weight of its loss.
    cfg.MODEL.PSP_HEAD.AUX_FEATURE = "res4"
    cfg.MODEL.PSP_HEAD.AUX_WEIGHT = 0.4

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
