//! Volumes and snapshots in the catalog.

use bulbil_types::{SnapshotId, VolumeId};
use sqlx::{Executor, Sqlite};

use crate::catalog::{Catalog, document, failed, is_unique_violation, to_document};
use crate::error::{ControlError, ErrorCode};
use crate::model::InstanceRecord;
use crate::volume_model::{SnapshotRecord, VolumeRecord};

/// Tables of schema version 2.
pub(crate) const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS volumes (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, instance_id TEXT UNIQUE, digest TEXT,
    created_at INTEGER NOT NULL, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS snapshots (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, digest TEXT NOT NULL,
    created_at INTEGER NOT NULL, record TEXT NOT NULL);
";

/// The row of an instance's root volume.
pub(crate) fn root_volume(instance: &InstanceRecord) -> VolumeRecord {
    VolumeRecord {
        id: instance.volume_id.clone(),
        name: None,
        size_bytes: instance.disk_bytes,
        instance_id: Some(instance.id.clone()),
        image: Some(instance.image.clone()),
        snapshot_id: None,
        cloned_from: None,
        digest: Some(instance.image_digest),
        created_at: instance.created_at,
    }
}

/// Adds a volume, within a transaction or without.
pub(crate) async fn insert_volume<'e>(
    executor: impl Executor<'e, Database = Sqlite>,
    volume: &VolumeRecord,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?)")
        .bind(volume.id.as_str())
        .bind(volume.name.as_ref().map(ToString::to_string))
        .bind(volume.instance_id.as_ref().map(ToString::to_string))
        .bind(volume.digest.map(|digest| digest.to_string()))
        .bind(volume.created_at)
        .bind(to_document(volume))
        .execute(executor)
        .await
        .map(drop)
}

impl Catalog {
    /// Adds a volume; an error when its name is taken.
    pub(crate) async fn add_volume(&self, volume: &VolumeRecord) -> Result<(), ControlError> {
        match (insert_volume(&self.pool, volume).await, &volume.name) {
            (Err(e), Some(name)) if is_unique_violation(&e) => {
                Err(ControlError::new(ErrorCode::InUse, format!("a volume named `{name}` exists already")))
            }
            (other, _) => other.map_err(|e| failed("write", e)),
        }
    }

    /// Lists the volumes, oldest first.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeRecord>, ControlError> {
        let rows = sqlx::query("SELECT record FROM volumes ORDER BY created_at, rowid").fetch_all(&self.pool).await;
        rows.map_err(|e| failed("read", e))?.iter().map(|row| document(row, "record")).collect()
    }

    /// Finds a volume by its id or its name.
    pub(crate) async fn find_volume(&self, wanted: &str) -> Result<Option<VolumeRecord>, ControlError> {
        let row = sqlx::query("SELECT record FROM volumes WHERE id = ?1 OR name = ?1").bind(wanted);
        let row = row.fetch_optional(&self.pool).await.map_err(|e| failed("read", e))?;
        row.map(|row| document(&row, "record")).transpose()
    }

    /// Keeps the new size of a volume, and of the instance whose root volume it is.
    pub(crate) async fn save_volume_size(
        &self,
        volume: &VolumeRecord,
        instance: Option<&InstanceRecord>,
    ) -> Result<(), ControlError> {
        let write = |e| failed("write", e);
        let mut both = self.pool.begin().await.map_err(write)?;
        let query = sqlx::query("UPDATE volumes SET record = ? WHERE id = ?");
        query.bind(to_document(volume)).bind(volume.id.as_str()).execute(&mut *both).await.map_err(write)?;
        if let Some(instance) = instance {
            let query = sqlx::query("UPDATE instances SET record = ? WHERE id = ?");
            query.bind(to_document(instance)).bind(instance.id.as_str()).execute(&mut *both).await.map_err(write)?;
        }
        both.commit().await.map_err(write)
    }

    pub(crate) async fn remove_volume(&self, id: &VolumeId) -> Result<(), ControlError> {
        let removed = sqlx::query("DELETE FROM volumes WHERE id = ?").bind(id.as_str()).execute(&self.pool).await;
        removed.map(drop).map_err(|e| failed("write", e))
    }

    /// Adds a snapshot; an error when its name is taken.
    pub(crate) async fn add_snapshot(&self, snapshot: &SnapshotRecord) -> Result<(), ControlError> {
        let added = sqlx::query("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?)")
            .bind(snapshot.id.as_str())
            .bind(snapshot.name.as_ref().map(ToString::to_string))
            .bind(snapshot.digest.to_string())
            .bind(snapshot.created_at)
            .bind(to_document(snapshot))
            .execute(&self.pool)
            .await;
        match (added, &snapshot.name) {
            (Err(e), Some(name)) if is_unique_violation(&e) => Err(snapshot_name_taken(name.as_str())),
            (other, _) => other.map(drop).map_err(|e| failed("write", e)),
        }
    }

    /// Lists the snapshots, oldest first.
    pub(crate) async fn snapshots(&self) -> Result<Vec<SnapshotRecord>, ControlError> {
        let rows = sqlx::query("SELECT record FROM snapshots ORDER BY created_at, rowid").fetch_all(&self.pool).await;
        rows.map_err(|e| failed("read", e))?.iter().map(|row| document(row, "record")).collect()
    }

    /// Finds a snapshot by its id or its name.
    pub(crate) async fn find_snapshot(&self, wanted: &str) -> Result<Option<SnapshotRecord>, ControlError> {
        let row = sqlx::query("SELECT record FROM snapshots WHERE id = ?1 OR name = ?1").bind(wanted);
        let row = row.fetch_optional(&self.pool).await.map_err(|e| failed("read", e))?;
        row.map(|row| document(&row, "record")).transpose()
    }

    pub(crate) async fn remove_snapshot(&self, id: &SnapshotId) -> Result<(), ControlError> {
        let removed = sqlx::query("DELETE FROM snapshots WHERE id = ?").bind(id.as_str()).execute(&self.pool).await;
        removed.map(drop).map_err(|e| failed("write", e))
    }
}

pub(crate) fn snapshot_name_taken(name: &str) -> ControlError {
    ControlError::new(ErrorCode::InUse, format!("a snapshot named `{name}` exists already"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An instance as version 1 has written it.
    const INSTANCE: &str = r#"{"id":"i-0123456789abcdef0","name":"web","image_id":"ami-0123456789abcdef0",
        "image":"debian:1","image_digest":"sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a",
        "volume_id":"vol-0123456789abcdef0","disk_bytes":1048576,"cpus":1,"memory_bytes":67108864,
        "personality":"ec2","boot_mode":"bios","mac":"52:54:00:01:02:03","hostname":"web","public_keys":[],
        "user_data_bytes":0,"publish":[],"created_at":1700000000}"#;

    const VERSION_1: &str = "
        CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
            created_at INTEGER NOT NULL, record TEXT NOT NULL, UNIQUE (name, version));
        CREATE TABLE instances (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, image_id TEXT NOT NULL,
            image_digest TEXT NOT NULL, created_at INTEGER NOT NULL, record TEXT NOT NULL, run TEXT NOT NULL);
        PRAGMA user_version = 1;";

    #[tokio::test]
    async fn a_catalog_of_version_1_gets_the_root_volumes_of_its_instances() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let old = sqlx::SqlitePool::connect_with(options).await.unwrap();
        sqlx::raw_sql(VERSION_1).execute(&old).await.unwrap();
        let added = sqlx::query("INSERT INTO instances VALUES ('i-0123456789abcdef0', 'web', 'x', 'y', 0, ?, '{}')");
        added.bind(INSTANCE).execute(&old).await.unwrap();
        old.close().await;
        for _ in 0..2 {
            let catalog = Catalog::open(&path).await.unwrap();
            let volumes = catalog.volumes().await.unwrap();
            assert_eq!(volumes.len(), 1);
            assert_eq!(volumes[0].id.as_str(), "vol-0123456789abcdef0");
            assert_eq!(volumes[0].instance_id.as_ref().unwrap().as_str(), "i-0123456789abcdef0");
            assert_eq!((volumes[0].size_bytes, volumes[0].image.as_deref()), (1 << 20, Some("debian:1")));
            assert_eq!(catalog.snapshots().await.unwrap(), []);
            catalog.pool.close().await;
        }
    }
}
