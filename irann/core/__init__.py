"""The four ideas as pure functions of tensors, and the legend of every letter.

| letter | axis                          | letter | axis                       |
|--------|-------------------------------|--------|----------------------------|
| b      | batch                         | e      | inner (expanded) width     |
| t      | place in the text             | n      | state of the state space   |
| s      | place attended to             | r      | thinking round             |
| d      | model width                   | v      | vocabulary                 |
| h      | attention head                | tau    | diffusion time             |
| c      | channel of a head             |        |                            |

Time in diffusion is `tau`, never `t`. Symbols: `alpha_bar` is the share of signal variance left at a noise level,
`delta` the step size of the state space, `A, B, C, D` its matrices, `h` (as a value, not an axis) its hidden state,
`p` a distribution over rounds. Likelihoods are in nats per character.

Everything here takes tensors and returns tensors: no modules, no files, and float64 in gives float64 out.
"""
