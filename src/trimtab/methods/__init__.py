"""Every method, one paper a file. Importing this package registers them."""

from trimtab.methods.control import actor_critic as actor_critic
from trimtab.methods.control import ddpg as ddpg
from trimtab.methods.control import dqn as dqn
from trimtab.methods.control import gpomdp as gpomdp
from trimtab.methods.control import harpg as harpg
from trimtab.methods.control import natural_gradient as natural_gradient
from trimtab.methods.control import npg_igt as npg_igt
from trimtab.methods.control import props as props
from trimtab.methods.control import sac as sac
from trimtab.methods.control import td3 as td3
from trimtab.methods.language import aepo as aepo
from trimtab.methods.language import bapo as bapo
from trimtab.methods.language import bases as bases
from trimtab.methods.language import bnpo as bnpo
from trimtab.methods.language import capo as capo
from trimtab.methods.language import chord as chord
from trimtab.methods.language import d3s as d3s
from trimtab.methods.language import dapo as dapo
from trimtab.methods.language import dpo as dpo
from trimtab.methods.language import dr_grpo as dr_grpo
from trimtab.methods.language import gpg as gpg
from trimtab.methods.language import gspo as gspo
from trimtab.methods.language import hapo as hapo
from trimtab.methods.language import rec as rec
from trimtab.methods.language import remix as remix
from trimtab.methods.language import subnetwork as subnetwork
