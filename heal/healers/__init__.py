"""How to repair: the name in params.yaml to its class."""

from heal.healers.adaprune import Adaprune
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.healers.bias_correction import BiasCorrection
from heal.healers.blockwise import Blockwise
from heal.healers.closed_form import ClosedForm
from heal.healers.distill import Distill
from heal.healers.global_reconstruction import GlobalReconstruction
from heal.healers.layerwise import Layerwise
from heal.healers.layerwise_variance import LayerwiseVariance
from heal.healers.least_squares import LeastSquares
from heal.healers.mean_folding import MeanFolding
from heal.healers.none import NoHealing
from heal.healers.qk_compensation import QkCompensation
from heal.healers.repair import Repair
from heal.healers.signal_resuscitation import SignalResuscitation
from heal.healers.starfish import Starfish
from heal.healers.unipts import Unipts
from heal.healers.variance_matching import VarianceMatching
from heal.healers.weight_statistic_correction import WeightStatisticCorrection
from heal.method import Healer

HEALERS: dict[str, type[Healer]] = {
    "adaprune": Adaprune,
    "batchnorm_recalibration": BatchnormRecalibration,
    "bias_correction": BiasCorrection,
    "blockwise": Blockwise,
    "closed_form": ClosedForm,
    "distill": Distill,
    "global_reconstruction": GlobalReconstruction,
    "layerwise": Layerwise,
    "layerwise_variance": LayerwiseVariance,
    "least_squares": LeastSquares,
    "mean_folding": MeanFolding,
    "none": NoHealing,
    "qk_compensation": QkCompensation,
    "repair": Repair,
    "signal_resuscitation": SignalResuscitation,
    "starfish": Starfish,
    "unipts": Unipts,
    "variance_matching": VarianceMatching,
    "weight_statistic_correction": WeightStatisticCorrection,
}
