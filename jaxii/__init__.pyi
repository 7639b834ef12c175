from jaxii import decoding as decoding
from jaxii import metrics as metrics
from jaxii.config import Config as Config
from jaxii.objective import losses as losses
from jaxii.runs.api import evaluate as evaluate
from jaxii.runs.api import load as load
from jaxii.runs.api import train as train
from jaxii.runs.run import Run as Run
