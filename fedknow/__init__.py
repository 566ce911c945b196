"""fedknow: federated continual learning with signature task knowledge."""

from pkgutil import extend_path

# The rooms (client, server, ...) lie beside this folder in the repository and are joined to
# this name when installed. Started from the repository's root, Python would see only this
# folder; this line finds the installed rooms too.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
