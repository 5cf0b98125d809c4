"""Graph nets of PyTorch Geometric in a LightningModule, with its own DataModule: batches are graphs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import global_mean_pool
from torch_geometric.nn import models as graph_models


def _graph(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    nodes = 5 + seed % 4
    x = torch.randn(nodes, 6, generator=generator)
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    return Data(x=x, edge_index=edges, y=(x.sum() > 0).long().reshape(1))


class _Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.graph, self.head = kind(6, 16, num_layers=2), nn.Linear(16, 2)

    def forward(self, data: Data) -> Tensor:
        return self.head(global_mean_pool(self.graph(data.x, data.edge_index), data.batch, data.num_graphs))


class _Classifier(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = _Net(getattr(graph_models, kind))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch), batch.y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch), batch.y)
        self.log("val_loss", loss, batch_size=batch.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def _model(name: str) -> Any:
    def fit(callbacks: list[Any], folder: Path) -> bool:
        graphs = [_graph(seed) for seed in range(64)]
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=2, default_root_dir=folder, callbacks=callbacks, **settings)
        trainer.fit(_Classifier(name), LightningDataset(graphs[:48], graphs[48:], batch_size=8))
        trainer.save_checkpoint(folder / "model.ckpt")
        _Classifier.load_from_checkpoint(folder / "model.ckpt")
        return True

    return fit


MODELS = {name: _model(name) for name in ("GCN", "GraphSAGE", "GIN", "GAT")}
