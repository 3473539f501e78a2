"""scripts/dashboard with W&B's server taken away: what it would send is printed. NOBODY is without an account.

With NOTHING no optional package is there.
"""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    if os.environ.get("NOTHING"):
        importlib.util.find_spec = lambda name, package=None: None
    else:
        take_the_server_away()
    folder = Path(__file__).parents[2] / "scripts" / "tasks" / "dashboards"
    sys.argv[0], sys.path[0] = str(folder / "build.py"), str(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


def take_the_server_away() -> None:
    import wandb
    import wandb_workspaces.workspaces.interface as workspaces
    from wandb_workspaces.reports.v2 import interface
    from wandb_workspaces.workspaces import internal

    if not hasattr(internal, "execute_graphql"):
        print("another way")
        raise SystemExit

    class Api:
        default_entity = "me"

        def __init__(self, *arguments, **options):
            if os.environ.get("NOBODY"):
                raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

        def projects(self, entity):
            return []

        def create_project(self, name, entity):
            pass

    def execute(api, query, variables=None):
        print(json.dumps(variables))
        view = {"id": "1", "name": "n", "displayName": "d", "description": "", "spec": variables["spec"],
                "project": {"name": "hoptim", "entityName": "me"}, "updatedAt": None, "createdAt": None}  # fmt: skip
        return {"upsertView": {"view": view, "inserted": True}}

    wandb.Api = Api
    for module in (interface, internal):
        module.execute_graphql = execute
        module.wandb.Api = Api
    interface.Report.url = workspaces.Workspace.url = "here"


if __name__ == "__main__":
    main()
