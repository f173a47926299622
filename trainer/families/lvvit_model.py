"""LV-ViT, registered with timm as lvvit_t, lvvit_s and lvvit_m: importing this module is enough for create_model.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021). It is
timm's VisionTransformer with another stem, scaled residual branches and a second, dense classifier. Parameters
have the names and shapes of the public code (github.com/zihangJiang/TokenLabeling), so its checkpoints load.

Shapes: B images, N = gh * gw patches, K of them kept, D width, C classes.
"""

from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from shards.errors import TicketSetError


class ConvStem(PatchEmbed):
    """Three convolutions at half resolution, then patches of the result: the public code's p_emb 4_2.

    A token of a 16 px patch sees 29 x 29 px: 7 above and left of its patch, 6 below and right. Gathered after the
    stem, a token carries traces of its dropped neighbors; to keep them out, blank their pixels before it.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        half = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, half, stride=half)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D], row-major.

        Raises:
            TicketSetError: images of another size than the model's.
        """
        if tuple(x.shape[-2:]) != tuple(self.img_size):
            raise TicketSetError(f"LV-ViT: expected images of {self.img_size} px, got {tuple(x.shape[-2:])}")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nn.functional.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class SkipScale(nn.Module):
    """Divides a residual branch. It stands where timm's Block has its LayerScale and adds no parameter."""

    def __init__(self, skip_lam: float) -> None:
        super().__init__()
        self.skip_lam = skip_lam

    def forward(self, x: Tensor) -> Tensor:
        return x / self.skip_lam


class LVViT(VisionTransformer):
    """A ViT that classifies the image by its class token, and every patch by a head of its own (`aux_head`).

    `model(images)` gives one tensor of logits, in training too, as timm's models do. A loss on the patches takes
    `forward_tokens`; the public model gives in training what that method gives.

    Args:
        skip_lam: what residual branches are divided by.
        stem_width: channels of the stem's convolutions.
        drop_rate: dropout before both heads.
        The others are timm's VisionTransformer's.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        stem_width: int = 64,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=partial(ConvStem, width=stem_width),
            norm_layer=nn.LayerNorm,  # eps 1e-5 as in the public code; timm's ViTs have 1e-6
        )
        for block in self.blocks if skip_lam != 1 else ():
            block.ls1, block.ls2 = SkipScale(skip_lam), SkipScale(skip_lam)
        self.aux_head = self._new_head()

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """As timm's, but for a class token as large as positions, as in the public code."""
        super().init_weights(*args, **kwargs)
        trunc_normal_(self.cls_token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, both; the public code keeps the old dense one."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_head()

    def _new_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, self.num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.to(self.pos_embed).train(self.training)

    def forward_tokens(self, tokens: Tensor, keep_indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Everything after the stem.

        Args:
            tokens: [B, K, D] of `patch_embed`, without positions.
            keep_indices: int64 [B, K] row-major places of the tokens in [0, N); None: all N, in order.
        Returns:
            class logits [B, C] and dense logits [B, K, C], one row a token, in the tokens' order.
        """
        first, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        places = table if keep_indices is None else table[0][keep_indices]
        x = torch.cat([(self.cls_token + first).expand(len(tokens), -1, -1), tokens + places], dim=1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)
        return self._heads(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1 + K, D] of timm's forward_features -> [B, C]; without classes the class token [B, D]."""
        if pre_logits or not self.num_classes:
            return super().forward_head(x, pre_logits)
        return self.combine(*self._heads(x))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.head_drop(x)
        return self.head(x[:, 0]), self.aux_head(x[:, 1:])

    @staticmethod
    def combine(class_logits: Tensor, dense_logits: Tensor) -> Tensor:
        """[B, C] and [B, K, C] -> [B, C]: class logits plus half of each class's greatest dense logit."""
        return class_logits + 0.5 * dense_logits.max(dim=1).values


_CFG = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.conv1",
    "classifier": ("head", "aux_head"),
}
default_cfgs = generate_default_cfgs({"lvvit_t": _CFG, "lvvit_s": _CFG, "lvvit_m": {**_CFG, "crop_pct": 1.0}})
_create = partial(build_model_with_cfg, LVViT, pretrained_filter_fn=checkpoint_filter_fn)


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T, the one without skip scaling."""
    return _create("lvvit_t", pretrained, **{"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0, **kwargs})


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S."""
    return _create("lvvit_s", pretrained, **{"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0, **kwargs})


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M."""
    return _create("lvvit_m", pretrained, **{"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0, **kwargs})
