//! The catalog: images, instances, volumes and snapshots, in SQLite.
//!
//! Each row is a JSON document beside the columns that are searched or unique. A change is durable
//! when the method returns.

use std::path::Path;
use std::str::FromStr as _;

use bulbil_types::{ImageId, ImageRef, InstanceId, Name};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row as _, SqlStr, sqlite::SqliteRow};

use crate::catalog_volumes::{self, insert_volume, root_volume};
use crate::error::{ControlError, ErrorCode};
use crate::model::{ImageRecord, InstanceRecord, RunState};

/// Version 1 had no volumes and no snapshots.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS images (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    created_at INTEGER NOT NULL, record TEXT NOT NULL, UNIQUE (name, version));
CREATE TABLE IF NOT EXISTS instances (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, image_id TEXT NOT NULL, image_digest TEXT NOT NULL,
    created_at INTEGER NOT NULL, record TEXT NOT NULL, run TEXT NOT NULL);
";

/// Makes the tables of this version, all or none; the root volumes of instances are filled in.
async fn upgrade(pool: &SqlitePool, from_version: i64) -> Result<(), sqlx::Error> {
    let mut all = pool.begin().await?;
    sqlx::raw_sql(SqlStr::from_static(SCHEMA)).execute(&mut *all).await?;
    sqlx::raw_sql(SqlStr::from_static(catalog_volumes::SCHEMA)).execute(&mut *all).await?;
    if from_version == 1 {
        let rows = sqlx::query("SELECT record FROM instances ORDER BY created_at, rowid").fetch_all(&mut *all).await?;
        for row in rows {
            let text: String = row.try_get("record")?;
            let instance = serde_json::from_str(&text).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
            insert_volume(&mut *all, &root_volume(&instance)).await?;
        }
    }
    let set_version = format!("PRAGMA user_version = {SCHEMA_VERSION}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(set_version)).execute(&mut *all).await?;
    all.commit().await
}

/// An instance with what was last known of it.
pub(crate) type InstanceRow = (InstanceRecord, RunState);

#[derive(Debug, Clone)]
pub(crate) struct Catalog {
    pub(crate) pool: SqlitePool,
}

pub(crate) fn failed(what: &str, error: sqlx::Error) -> ControlError {
    let code = match error.as_database_error() {
        // SQLITE_FULL
        Some(error) if error.code().as_deref() == Some("13") => ErrorCode::NoSpace,
        _ => ErrorCode::Failed,
    };
    ControlError::with_source(code, format!("cannot {what} the catalog"), &error)
}

pub(crate) fn is_unique_violation(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}

pub(crate) fn document<T: serde::de::DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, ControlError> {
    let text: String = row.try_get(column).map_err(|e| failed("read", e))?;
    serde_json::from_str(&text)
        .map_err(|e| ControlError::with_source(ErrorCode::Failed, "a record of the catalog cannot be read", &e))
}

pub(crate) fn to_document(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("records are plain data")
}

impl Catalog {
    pub(crate) async fn open(path: &Path) -> Result<Self, ControlError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // Full: a commit is on disk when it returns, also over a loss of power.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(std::time::Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await;
        let pool = pool.map_err(|e| failed("open", e))?;
        let version: i64 =
            sqlx::query_scalar("PRAGMA user_version").fetch_one(&pool).await.map_err(|e| failed("open", e))?;
        if version > SCHEMA_VERSION {
            let text = format!("the catalog has schema {version}; this bulbil knows {SCHEMA_VERSION}: use a newer one");
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        if version < SCHEMA_VERSION {
            upgrade(&pool, version).await.map_err(|e| failed("open", e))?;
        }
        Ok(Self { pool })
    }

    /// Adds an image; an error when its name and version are taken.
    pub(crate) async fn add_image(&self, image: &ImageRecord) -> Result<(), ControlError> {
        let added = sqlx::query("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)")
            .bind(image.id.as_str())
            .bind(image.name.as_str())
            .bind(image.version.as_str())
            .bind(image.digest.to_string())
            .bind(image.created_at)
            .bind(to_document(image))
            .execute(&self.pool)
            .await;
        match added {
            Err(e) if is_unique_violation(&e) => {
                let text = format!("image `{}:{}` exists already, with other content", image.name, image.version);
                Err(ControlError::new(ErrorCode::InUse, text))
            }
            other => other.map(drop).map_err(|e| failed("write", e)),
        }
    }

    pub(crate) async fn images(&self) -> Result<Vec<ImageRecord>, ControlError> {
        let rows = sqlx::query("SELECT record FROM images ORDER BY name, created_at").fetch_all(&self.pool).await;
        rows.map_err(|e| failed("read", e))?.iter().map(|row| document(row, "record")).collect()
    }

    /// Finds an image; a name without a version means the newest.
    pub(crate) async fn find_image(&self, wanted: &ImageRef) -> Result<Option<ImageRecord>, ControlError> {
        let query = match wanted {
            ImageRef::Id(id) => sqlx::query("SELECT record FROM images WHERE id = ?").bind(id.to_string()),
            ImageRef::Named { name, version: Some(version) } if version.as_str() != "latest" => {
                sqlx::query("SELECT record FROM images WHERE name = ? AND version = ?")
                    .bind(name.to_string())
                    .bind(version.to_string())
            }
            ImageRef::Named { name, .. } => {
                sqlx::query("SELECT record FROM images WHERE name = ? ORDER BY created_at DESC, rowid DESC LIMIT 1")
                    .bind(name.to_string())
            }
        };
        let row = query.fetch_optional(&self.pool).await.map_err(|e| failed("read", e))?;
        row.map(|row| document(&row, "record")).transpose()
    }

    pub(crate) async fn remove_image(&self, id: &ImageId) -> Result<(), ControlError> {
        let removed = sqlx::query("DELETE FROM images WHERE id = ?").bind(id.as_str()).execute(&self.pool).await;
        removed.map(drop).map_err(|e| failed("write", e))
    }

    /// Adds an instance with its root volume; an error when its name is taken.
    pub(crate) async fn add_instance(&self, record: &InstanceRecord, run: &RunState) -> Result<(), ControlError> {
        let mut both = self.pool.begin().await.map_err(|e| failed("write", e))?;
        let added = sqlx::query("INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?, ?)")
            .bind(record.id.as_str())
            .bind(record.name.as_str())
            .bind(record.image_id.as_str())
            .bind(record.image_digest.to_string())
            .bind(record.created_at)
            .bind(to_document(record))
            .bind(to_document(run))
            .execute(&mut *both)
            .await;
        match added {
            Err(e) if is_unique_violation(&e) => {
                Err(ControlError::new(ErrorCode::InUse, format!("an instance named `{}` exists already", record.name)))
            }
            Err(e) => Err(failed("write", e)),
            Ok(_) => {
                insert_volume(&mut *both, &root_volume(record)).await.map_err(|e| failed("write", e))?;
                both.commit().await.map_err(|e| failed("write", e))
            }
        }
    }

    pub(crate) async fn instances(&self) -> Result<Vec<InstanceRow>, ControlError> {
        let rows =
            sqlx::query("SELECT record, run FROM instances ORDER BY created_at, rowid").fetch_all(&self.pool).await;
        rows.map_err(|e| failed("read", e))?.iter().map(instance_row).collect()
    }

    /// Finds an instance by its id or its name.
    pub(crate) async fn find_instance(&self, wanted: &str) -> Result<Option<InstanceRow>, ControlError> {
        let column = if InstanceId::from_str(wanted).is_ok() { "id" } else { "name" };
        let query = format!("SELECT record, run FROM instances WHERE {column} = ?");
        let row = sqlx::query(sqlx::AssertSqlSafe(query)).bind(wanted).fetch_optional(&self.pool).await;
        row.map_err(|e| failed("read", e))?.as_ref().map(instance_row).transpose()
    }

    /// Keeps what is known of an instance; one that is gone is fine.
    pub(crate) async fn save_run(&self, id: &InstanceId, run: &RunState) -> Result<(), ControlError> {
        let saved = sqlx::query("UPDATE instances SET run = ? WHERE id = ?")
            .bind(to_document(run))
            .bind(id.as_str())
            .execute(&self.pool)
            .await;
        saved.map(drop).map_err(|e| failed("write", e))
    }

    /// Removes an instance with its root volume.
    pub(crate) async fn remove_instance(&self, id: &InstanceId) -> Result<(), ControlError> {
        let write = |e| failed("write", e);
        let mut both = self.pool.begin().await.map_err(write)?;
        for query in ["DELETE FROM volumes WHERE instance_id = ?", "DELETE FROM instances WHERE id = ?"] {
            sqlx::query(query).bind(id.as_str()).execute(&mut *both).await.map_err(write)?;
        }
        both.commit().await.map_err(write)
    }
}

fn instance_row(row: &SqliteRow) -> Result<InstanceRow, ControlError> {
    Ok((document(row, "record")?, document(row, "run")?))
}

/// The version an image gets when none is given.
pub(crate) fn first_version() -> Name {
    "1".parse().expect("a digit is a name")
}
