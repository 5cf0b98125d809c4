"""Whether a metric is better when it is higher, as the callbacks that watch it say."""

from types import SimpleNamespace

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_quant.callbacks.directions import watched


def test_callbacks_that_watch_a_metric_say_it_too() -> None:
    callbacks = [ModelCheckpoint(monitor="val_loss"), EarlyStopping("val_iou", mode="max"), ModelCheckpoint()]
    states = {callback.state_key: {} for callback in callbacks}

    assert watched(SimpleNamespace(callbacks=callbacks)) == {"val_loss": False, "val_iou": True}
    # A checkpoint is quantized by a Trainer without them.
    assert watched(SimpleNamespace(callbacks=[]), {"callbacks": states}) == {"val_loss": False, "val_iou": True}
