"""Which store the settings ask for. The only module that knows all of them."""

from __future__ import annotations

import logging

from service.settings import Settings, SettingsError
from service.stores import Store
from service.stores.lru import Recent

log = logging.getLogger(__name__)

# Not a secret: it finds rot and misplaced values in Redis, but anybody who can write there can seal with it too.
PUBLIC_KEY = b"fewshot: no key was given"
LEAST_KEY = 16  # characters of one that is given


def open_store(settings: Settings) -> Store:
    """The store, not yet opened: `await store.open()` prepares its files or connections."""
    given = settings.secret(settings.store_key_file).encode()
    if settings.store_key_file is not None and len(given) < LEAST_KEY:
        raise SettingsError(f"{settings.store_key_file} holds no key of at least {LEAST_KEY} characters.")
    return Recent(_beneath(settings, given), most=settings.lru_heads, stale_ok_s=settings.stale_ok_s)


def _beneath(settings: Settings, key: bytes) -> Store:
    # Each store is imported only where it is used: without Redis its client costs no start-up time.
    if not settings.redis_url:
        from service.stores.sqlite import SqliteStore

        return SqliteStore(
            settings.data_dir,
            key=key or None,
            head_ttl_s=settings.head_ttl_s,
            versions_kept=settings.versions_kept,
        )
    from service.stores.redis import RedisStore

    if not key:
        log.warning(
            "STORE_KEY_FILE is not set: values in Redis are sealed against rot, not against who can write there."
        )
    return RedisStore(
        settings.redis_url,
        key=key or PUBLIC_KEY,
        head_ttl_s=settings.head_ttl_s,
        versions_kept=settings.versions_kept,
        timeout_s=settings.store_timeout_s,
        user=settings.redis_user,
        password=settings.secret(settings.redis_password_file),
    )
