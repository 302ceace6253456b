"""Accounts: there is one per key."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.http.app import account_of
from homefire.http.bodies import json_response
from homefire.wire.errors import NotFound
from homefire.wire.resources import Account


class AccountList(msgspec.Struct, frozen=True, rename="camel"):
    accounts: list[Account]
    next_page_token: str = ""
    total_size: int = 1


def own_account(request: Request) -> str:
    """The account in the path, which must be the caller's: another one's resources do not exist."""
    named, own = request.path_params["account"], account_of(request)
    if named != own:
        raise NotFound(f"account {named!r} does not exist for this key", hint=f"use {own!r}")
    return own


async def list_accounts(plane: ControlPlane, request: Request) -> Response:
    return json_response(AccountList([_account(account_of(request))]))


async def get_account(plane: ControlPlane, request: Request) -> Response:
    return json_response(_account(own_account(request)))


def _account(account: str) -> Account:
    return Account(name=f"accounts/{account}", display_name=account)


ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/accounts",
        list_accounts,
        "The caller's account, alone",
        AccountList,
        query=("pageSize",),
    ),
    Endpoint("GET", "/v1/accounts/{account}", get_account, "The caller's account", Account),
]
