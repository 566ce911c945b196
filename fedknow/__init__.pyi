"""Public names of fedknow, for editors and type checkers."""

from fedknow.api.callbacks import Callback as Callback
from fedknow.api.callbacks import EarlyStopping as EarlyStopping
from fedknow.api.callbacks import KeepBest as KeepBest
from fedknow.api.callbacks import StopRun as StopRun
from fedknow.api.comparisons import ComparedRuns as ComparedRuns
from fedknow.api.comparisons import compare as compare
from fedknow.api.experiments import experiment as experiment
from fedknow.api.live import LivePlot as LivePlot
from fedknow.api.runs import Run as Run
from fedknow.api.runs import load_run as load_run
from fedknow.api.simulation import simulate as simulate
from fedknow.api.sweeps import SearchResult as SearchResult
from fedknow.api.sweeps import search as search
from fedknow.client.data import Dataset as Dataset
from fedknow.client.learners import Learner as Learner
from fedknow.client.learners import LearnerSettings as LearnerSettings
from fedknow.client.learners import list_learners as list_learners
from fedknow.client.models import list_models as list_models
from fedknow.client.models.split import SplitModel as SplitModel
from fedknow.protocols.config import ConfigError as ConfigError
from fedknow.protocols.config import ExperimentConfig as ExperimentConfig
from fedknow.protocols.errors import FedknowError as FedknowError

__version__: str
__all__: list[str]
