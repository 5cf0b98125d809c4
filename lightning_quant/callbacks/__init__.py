"""WHEN: Lightning callbacks that decide at which hook the stages run."""

from lightning_quant.callbacks.monitor import QuantizationMonitor
from lightning_quant.callbacks.ptq import PostTrainingQuantization
from lightning_quant.callbacks.qat import QuantizationAwareTraining
from lightning_quant.callbacks.schedule import Schedule

__all__ = ["PostTrainingQuantization", "QuantizationAwareTraining", "QuantizationMonitor", "Schedule"]
