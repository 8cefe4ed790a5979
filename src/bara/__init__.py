"""Bayesian low-rank adaptation with adaptive rank, as PEFT methods."""

from importlib.metadata import version

import bara.machine  # noqa: F401  (before what imports PEFT)
from bara.adapter.peft_model import BayesianLoraModel
from bara.certificates.certificate import Certificate, certify
from bara.data.images import load_images
from bara.data.questions import QuestionWindows, question_windows
from bara.draws.sampling import sampling
from bara.errors import BaraError
from bara.evaluation.abstention import Threshold, calibrate_threshold
from bara.evaluation.acquisition import Selection, select
from bara.evaluation.conformal import Conformal, calibrate_conformal
from bara.evaluation.evaluate import evaluate
from bara.evaluation.preferences import evaluate_preferences
from bara.evaluation.review import Review, review
from bara.evaluation.trainer_metrics import compute_metrics
from bara.export.export_lora import export_lora
from bara.finetuning.bayesianize import Bayesianized, bayesianize
from bara.finetuning.load import load_adapter
from bara.finetuning.predict_dataset import predict_dataset
from bara.language.answer import Generation
from bara.language.generation import generate
from bara.language.multiple_choice import multiple_choice
from bara.language.preferences import PreferencePredictive, predict_preferences
from bara.language.streaming import StreamedToken, generate_stream
from bara.models.sentence import SentenceClassifier
from bara.posteriors.balora import BaloraConfig
from bara.posteriors.bara_config import BaraConfig
from bara.posteriors.blob import BlobConfig
from bara.posteriors.certified import CertifiedConfig
from bara.posteriors.clora import CloraConfig
from bara.posteriors.mc_dropout import McDropoutConfig
from bara.posteriors.rankwise import RankwiseConfig
from bara.posteriors.scalabl import ScalablConfig
from bara.posteriors.sgp_lora import SgpLoraConfig
from bara.prediction.likelihood import gaussian_nll
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predict import predict
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.spans import SpanPredictive
from bara.prediction.words import TokenPredictive
from bara.ranks.effective_rank import EffectiveRank, calibrate_gates, effective_rank, rank_shift
from bara.ranks.features import adapter_features
from bara.ranks.pruning import prune
from bara.ranks.recommendation import RankRecommendation, recommend_ranks
from bara.reports.measured_card import write_model_card
from bara.training.callback import BayesianCallback, set_progress
from bara.training.head import scale_head
from bara.training.kl_mixin import KLMixin
from bara.training.loss import elbo_loss, kl_loss, kl_terms

__version__ = version("bara-peft")

__all__ = [
    "BaloraConfig",
    "BaraConfig",
    "BaraError",
    "BayesianCallback",
    "BayesianLoraModel",
    "Bayesianized",
    "BlobConfig",
    "Certificate",
    "CertifiedConfig",
    "ClassificationPredictive",
    "CloraConfig",
    "Conformal",
    "EffectiveRank",
    "Generation",
    "KLMixin",
    "McDropoutConfig",
    "MultiLabelPredictive",
    "Predictive",
    "PreferencePredictive",
    "QuestionWindows",
    "RankRecommendation",
    "RankwiseConfig",
    "RegressionPredictive",
    "Review",
    "ScalablConfig",
    "Selection",
    "SentenceClassifier",
    "SgpLoraConfig",
    "SpanPredictive",
    "StreamedToken",
    "Threshold",
    "TokenPredictive",
    "adapter_features",
    "bayesianize",
    "calibrate_conformal",
    "calibrate_gates",
    "calibrate_threshold",
    "certify",
    "compute_metrics",
    "effective_rank",
    "elbo_loss",
    "evaluate",
    "evaluate_preferences",
    "export_lora",
    "gaussian_nll",
    "generate",
    "generate_stream",
    "kl_loss",
    "kl_terms",
    "load_adapter",
    "load_images",
    "multiple_choice",
    "predict",
    "predict_dataset",
    "predict_preferences",
    "prune",
    "question_windows",
    "rank_shift",
    "recommend_ranks",
    "review",
    "sampling",
    "scale_head",
    "select",
    "set_progress",
    "write_model_card",
]
