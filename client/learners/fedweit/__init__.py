"""FedWeIT (ICML 2021): weights of shared, adaptive and borrowed parts.

Yoon, Jeong, Lee, Yang and Hwang, "Federated Continual Learning with Weighted Inter-client
Transfer", ICML 2021, arXiv 2003.03196. This is the client's half. The server's is
:class:`fedknow.strategies.fedweit.FedWeit`.

Every parameter of the body is split, for a client's task t (Eq. 2),

    theta_t = B * sigmoid(m_t) + A_t + sum_c alpha_t,c A_c

into the shared base B under a mask of units m_t, adaptive parameters A_t, and other
clients' adaptive parameters A_c weighted by attention. A round minimises over B, m_t,
alpha_t and all the client's A_1..t (Eq. 3)

    L(theta_t) + lambda_1 (sum_i |A_i| + ...) + lambda_2 sum_{i<t} ||(B - B') sigmoid(m_i) +
    A_i - A'_i||^2

where B' and A' are those at the end of task t - 1; B' is the global base that the task
ended with, for every client the same. When a task is over, entries of A below lambda_1 are
dropped and A_t goes to the server; with a client's first work of the next task come all
clients' A_t.

The paper leaves some things open. They are as in the authors' code
(github.com/wyjeong/FedWeIT):

- A_c are those of the previous task alone; the paper sums over all past ones;
- attention is one number a client and parameter tensor;
- the base of units with a small mask is not sent;
- the server averages each weight over those who sent it; a plain mean would shrink it.

In other points this module differs from that code:

- biases are split like weights, A starts at 0 instead of B / 3 and attention at 0 instead
  of at random;
- masks start at 3, where the gate is 0.95, instead of around 0, where it is 0.5;
- the A_i of past tasks are trained, as in the paper; theirs stay as they were;
- A_c are those of all other clients; theirs come from the clients that were selected in the
  last round, this one included if it was;
- small entries of A are dropped for good when the task is over; theirs are dropped only from
  a message and when it is scored;
- B' is the global base, and not the client's own as it last trained it, from before the
  next global one arrives;
- a client gets the previous global base of units that nobody sent, and does not keep its own;
- the squared norm is not halved, so lambda_2 = 100 weighs twice what theirs does;
- weight decay acts on B in every task, not in the first alone;
- of units with equal masks the earlier ones are sent, so that their number is as asked.

The paper's lambda_1 is on the masks too. Here that weight is a setting of its own
(``mask_sparsity``), by default 0 as in their code.
"""

from fedknow.client.learners.fedweit.learner import FedWeit
from fedknow.client.learners.fedweit.parameters import sent_units
from fedknow.client.learners.fedweit.settings import FedWeitSettings

__all__ = ["FedWeit", "FedWeitSettings", "sent_units"]
