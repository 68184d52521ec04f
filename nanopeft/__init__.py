# SPDX-License-Identifier: MIT
"""nanopeft: parameter-efficient fine-tuning, one file per technique. Nothing is imported here: open the file.

The whole family in one table. Every method freezes the pretrained model and trains a few numbers more. Counts are for
GPT-2 (124,439,808 parameters) with r = 8 on all linear layers, m = 48, n = 20 virtual tokens.

    method          where it acts                      trained      stored       start                   mergeable
    full            every weight                       124,439,808  124,439,808  the pretrained weights  is the model
    LoRA            ΔW = s·BA beside linear layers       1,179,648    1,179,648  B = 0: no change        yes
    QLoRA           LoRA over a base in 4 bits           1,179,648    1,179,648  B = 0: rounding only    into 16 bits
    DoRA            LoRA, and the length of W's rows     1,262,592    1,262,592  m = ‖W‖: no change      yes
    AdaLoRA         ΔW = s·PΛQ, r = 12, then pruned      1,770,048  what is left Λ = 0: no change        yes
    IA3             scales keys, values, MLP                64,512       64,512  l = 1: no change        yes
    BitFit          the biases                             102,144      102,144  the base's              is the model
    adapter         after attention and MLP (Houlsby)    1,789,056    1,789,056  Up = 0: no change       no: nonlinear
                    after the block (Pfeiffer)             894,528      894,528  Up = 0: no change       no: nonlinear
    AdapterFusion   attention over N adapters           21,252,096   23,041,152  V = I: their mean       no
    prefix-tuning   keys, values in every layer            368,640      368,640  n real tokens' k, v     no
                    through an MLP of width 512          9,864,704      368,640  n real tokens' k, v     no
    prompt tuning   vectors before the input                15,360       15,360  n words' embeddings     no
    P-tuning        vectors anywhere in the input        8,286,720       15,360  what the LSTM gives     no

    method          gradient flows down to             extra cost at inference              context lost
    full            the embedding                      none                                 none
    LoRA            the lowest adapted layer           none once merged                     none
    QLoRA           the lowest adapted layer           dequantizing, until merged           none
    DoRA, AdaLoRA   the lowest adapted layer           none once merged                     none
    IA3, BitFit     the lowest layer                   none once merged                     none
    adapter         the lowest adapter                 two small layers in sequence, each   none
    AdapterFusion   the lowest fusion                  N adapters and an attention, each    none
    prefix-tuning   the lowest layer's keys            n more keys and values a layer       n positions
    prompt tuning   the input                          n more tokens through every layer    n positions
    P-tuning        the input                          n more tokens through every layer    n positions

(AdapterFusion of N = 2 Pfeiffer adapters, which its file holds too. P-tuning with the LSTM of the paper's code.)
All save memory for gradients and Adam's state, 12 to 16 bytes for each number that is not trained. None saves much of
the activations: the gradient still passes through the layers above the lowest trained number.
"""

__version__ = "0.1.0"
